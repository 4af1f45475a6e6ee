"""Published weights in."""
