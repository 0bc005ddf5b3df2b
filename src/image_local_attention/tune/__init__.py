"""The search for launch plans: candidates, processes that compile them, times, and what is worth remembering."""
