"""The tests mirror both packages and the examples; `tests.support` is what they share."""
