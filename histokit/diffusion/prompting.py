"""Captions: templates and how their {label} and {group} are filled in, the same in training and in generation."""

VERSION = 1
TEMPLATES = (
    "a histology image of {label}",
    "an H&E tile of {label}",
    "H&E stained {label}",
    "a microscopy tile showing {label}",
    "a histology image of {label}, cropped",
    "a close-up of {label}",
)


def caption(template, label, group=""):
    """`template` with {label} and {group} filled in; a group the template has no place for is left out."""
    if "{label}" not in template:
        raise ValueError(f"the prompt {template!r} has no {{label}}; write for example 'a histology image of {{label}}'")
    return template.replace("{label}", label).replace("{group}", group).strip(" ,")


def group_words(terms, group):
    """How a caption calls a group: by `terms`, {group: words}, else by its own name; the same in training and in generation."""
    return (terms or {}).get(group, group)
