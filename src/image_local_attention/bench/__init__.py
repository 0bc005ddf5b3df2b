"""The benchmark: what is timed, how, beside whom, and what is kept of it."""
