"""The pre-ranker: two towers over content and growing ids, trained on what was exposed and on pseudo-labels."""
