"""Sentences under a figure, wrapped."""

from textwrap import fill


def say(*lines, width=120):
    """Print each line, wrapped at `width` characters; nothing for none."""
    for line in lines:
        print(fill(line, width) if line else "")
