"""Stage `importance`: one forward pass over calibration samples scores every axis."""
