"""The panel of sliders: previews that never block, a sweep of settings, the button that writes the recipe."""
