// What a panel of sliders needs beside its widgets: Escape cancels, and the pointer wipes from the result to its source.
export default {
  render({ model, el }) {
    const panel = event => {
      const own = el.closest(".hk-tuner");
      return own && event.target instanceof Element && own.contains(event.target) ? own : null;
    };
    const key = event => {
      if (event.key !== "Escape" || !panel(event)) return;
      event.stopPropagation(); // in a notebook Escape leaves the cell
      model.send({ key: "Escape" });
    };
    const wipe = event => {
      const field = panel(event) && event.target.closest(".hk-wipe");
      if (!field) return;
      const box = field.getBoundingClientRect();
      field.style.setProperty("--hk-wipe", `${Math.max(0, Math.min(100, (100 * (event.clientX - box.left)) / box.width))}%`);
    };
    document.addEventListener("keydown", key, true);
    document.addEventListener("pointermove", wipe, { passive: true });
    return () => {
      document.removeEventListener("keydown", key, true);
      document.removeEventListener("pointermove", wipe);
    };
  },
};
