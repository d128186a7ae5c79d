"""What evaluations and comparisons are computed from and shown with: intervals, arms, scores, features, figures."""
