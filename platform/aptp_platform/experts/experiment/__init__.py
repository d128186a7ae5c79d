"""The method beside its opponents: the runs, how their scores compare, and the page that tells it."""
