"""Answers to the exercises, one file a notebook: RIGHT, those that must be taken, by the name of their check; WRONG,
those that must not, each with the sentence that it must get."""
