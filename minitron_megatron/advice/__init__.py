"""A recipe held against what the papers and later work found: what it does otherwise, why that costs, and the mend."""
