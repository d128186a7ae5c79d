"""From a trained router to a release: assign, cut, score, evaluate, publish; and the search over settings."""
