"""Stage `depth`: what is missed least when it is left out, layer by layer or block by block."""
