"""When each process of a distillation step works and when it waits: a model of the two pipelines, no measurement."""
