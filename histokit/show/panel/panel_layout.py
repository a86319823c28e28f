"""The widgets of a panel and where they lie: pictures on the left, controls beside them, points below. Nothing here answers them."""

from histokit.show.panel import panel_html
from histokit.show.panel.panel_html import decimals, line, words

THUMB = 104  # px on screen of a point


class PanelLayout:
    """`widget` is the whole, its parts are attributes: sliders {name: slider}, buttons, and the fields that text and pictures go into.

    Args:
        limits: {name: widgets.Limits}.
        options: of the chooser, (text, position) of each source tile; it is left out where there is one.
        refused: (text of the button, why) where there is no recipe to write into, else None.
        place: where in the recipe the button writes to.
        can_end, can_rest: whether "Keep this one" and "Free GPU" are offered.
        with_source: whether there is a source to show beside the preview; with_sweep: whether there are points.
    """

    def __init__(self, limits, options, refused, place, *, can_end, can_rest, with_source, with_sweep):
        import ipywidgets as w

        wide, beside = w.Layout(width="330px"), {"description_width": "100px"}
        self.sliders = {}
        for name, (value, low, high, step) in limits.items():
            self.sliders[name] = w.FloatSlider(
                value=value, min=low, max=high, step=step, description=words(name), continuous_update=True, layout=wide,
                readout_format=f".{decimals(step)}f", style=beside,
            )  # fmt: skip
        self.chooser = w.Dropdown(options=options, description="source tile", layout=wide, style=beside)
        self._add_buttons(refused, can_end, can_rest)
        self.head, self.left, self.right, self.others, self.title, self.said, self.reading = (w.HTML() for _ in range(7))
        self.status = w.HTML(line("The sliders answer while the kernel of this notebook runs."))
        self.row, self.pins = (w.GridBox(layout=w.Layout(grid_gap="4px 10px")) for _ in range(2))

        one = [self.chooser] if len(options) > 1 else []
        acts = w.HBox([self.stop, self.enough, self.pin, self.free], layout=w.Layout(margin="0 0 0 104px", flex_flow="row wrap"))
        buttons = w.HBox([self.button, self.back]), acts
        controls = w.VBox([self.head, *one, *self.sliders.values(), self.status, *buttons, w.HTML(line(refused[1] if refused else place))])
        controls.layout = w.Layout(width="360px")
        pair = w.HBox([self.left, self.right] if with_source else [self.right])
        stage = w.HBox([w.VBox([pair, self.reading]), controls], layout=w.Layout(flex_flow="row wrap"))
        self.keys = panel_html.keys()
        boxes = [w.HTML(panel_html.STYLE), self.keys, stage, self.said, self.pins, self.others]
        if with_sweep:
            boxes += [self.title, self.row]
        self.widget = w.VBox(boxes)
        self.widget.add_class("hk-tuner")
        self.widget._view_count = 0  # a front end counts up when it shows the panel

    def _add_buttons(self, refused, can_end, can_rest):
        import ipywidgets as w

        def room(offered=True):
            return w.Layout(width="auto", flex="0 0 auto", margin="10px 6px 0 0", display="" if offered else "none")

        self.button = w.Button(
            description=refused[0] if refused else "Write into recipe", disabled=bool(refused), button_style="primary",
            icon="" if refused else "pencil", layout=w.Layout(width="auto", margin="10px 6px 0 104px"),
        )  # fmt: skip
        self.back = w.Button(description="Undo", icon="undo", layout=w.Layout(width="auto", margin="10px 6px 0 0", display="none"))
        self.stop = w.Button(description="Cancel", icon="stop", disabled=True, layout=room(), tooltip="Escape does the same")
        self.enough = w.Button(description="Keep this one", icon="check", disabled=True, layout=room(can_end))
        self.pin = w.Button(description="Pin", icon="thumb-tack", layout=room(), tooltip="keep this picture and its settings in sight")
        told = "its memory is taken again when something is drawn"
        self.free = w.Button(description="Free GPU", icon="eject", layout=room(can_rest), tooltip=told)

    def fill(self, grid, cells, columns):
        """Put cells into a grid, each (picture as HTML, text and tooltip of the button under it, what the button calls)."""
        import ipywidgets as w

        boxes = []
        for picture, text, tip, press in cells:
            button = w.Button(description=text, tooltip=tip, layout=w.Layout(width=f"{THUMB}px"))
            button.on_click(press)
            boxes.append(w.VBox([w.HTML(picture), button]))
        grid.layout.grid_template_columns = f"repeat({min(columns, max(1, len(boxes)))}, {THUMB + 8}px)"
        grid.children = boxes
