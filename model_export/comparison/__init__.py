"""Models side by side: what each takes, and what it loses against one of them."""

# What a sweep keeps beside its bundles.
RESULTS = "sweep.json"
