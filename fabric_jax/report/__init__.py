"""A report from records only: published tables beside ours, verdicts, figures."""
