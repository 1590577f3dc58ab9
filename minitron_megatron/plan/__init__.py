"""What a recipe takes before a job is sent: memory, work, time and traffic of every stage, for one layout or for all that fit."""
