"""What the button of a panel does: the settings of a picture into the recipe, for a class or for all, and back again.

Nothing here raises: what went wrong is a sentence.
"""

from histokit.core import files
from histokit.runs import recipe_edit


class RecipeWriter:
    """Writes into the recipe of one run. `written`: what the file held before and after the last writing, None where there is none to undo.

    Args:
        run: gives recipe (path, or "" for none), class_name and step.
        say: `say(values)` -> the values in words.
    """

    def __init__(self, run, say):
        self.run, self.say, self.written = run, say, None
        self.known = self._current()

    def _target(self):
        return files.root() / self.run.recipe

    def _current(self):
        """What the recipe says now, None when it cannot be read."""
        try:
            return recipe_edit.current(self._target(), self.run.class_name, self.run.step) if self.run.recipe else None
        except (ValueError, OSError):
            return None

    def refused(self):
        """(two words, a sentence) where nothing can be written, None where it can."""
        if not self.run.recipe:
            return (
                "No recipe",
                "This notebook was opened by hand, without a recipe to write into; `histokit open RECIPE STEP` gives it one.",
            )
        return None

    def place(self):
        """Where in the recipe the values go: under the class, or into the step of a run for all classes."""
        name, step = self.run.class_name, self.run.step
        return f"{self.run.recipe}, {step}" if name in recipe_edit.EVERY else f"{self.run.recipe}, classes: {name}: {step}"

    def write(self, values, started):
        """A sentence, and the difference as text; `started`: the values this notebook goes on with."""
        name, step = self.run.class_name, self.run.step
        try:
            before = self._target().read_bytes()
            difference = recipe_edit.apply(self._target(), name, step, values, expected=self.known)
        except recipe_edit.RecipeChanged as error:
            self.known = self._current()
            return f"{str(error).partition(chr(10))[0]}. Press again to write {self.say(values)} instead.", ""
        except OSError as error:
            reason = f"{self.run.recipe}: {error.strerror}" if error.strerror else str(error)
            said = "" if "nothing was written" in reason else "; nothing was written"
            return f"{reason}{said}. To add by hand:", recipe_edit.lines(name, step, values)
        except ValueError as error:
            return str(error), ""
        self.known = self._current()
        if not difference:
            return f"{self.run.recipe} says so already: {self.say(values)} for {'all classes' if name in recipe_edit.EVERY else name}.", ""
        self.written = before, self._target().read_bytes()
        return f"Written into {self.run.recipe} for the next headless run. This notebook goes on with {self.say(started)}.", difference

    def undo(self):
        """Puts the recipe back as it was before the last writing; returns a sentence. What was edited since then is kept."""
        before, after = self.written
        try:
            if self._target().read_bytes() != after:
                return f"{self.run.recipe} was edited since then; nothing was undone."
            files.write_bytes(self._target(), before)
        except OSError as error:
            return f"{self.run.recipe}: {error.strerror or error}; nothing was undone."
        self.written, self.known = None, self._current()
        return f"{self.run.recipe} is as it was before."
