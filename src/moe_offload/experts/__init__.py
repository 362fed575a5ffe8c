"""Where experts live and who computes them: store, cache, fetcher, plan, dispatcher."""
