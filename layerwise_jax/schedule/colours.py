"""Colours and names of the kinds of actions in pictures."""

from __future__ import annotations

# Forward is cool, backward warm, the weight gradient green; their greys differ too.
COLOURS: dict[str, str] = {"F": "#9ecae1", "B": "#fc8d59", "I": "#fdbb84", "W": "#a1d99b"}
NAMES: dict[str, str] = {
    "F": "forward",
    "B": "backward",
    "I": "input gradient",
    "W": "weight gradient",
}
