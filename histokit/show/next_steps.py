"""What to try next, at the end of every page: a sentence that follows from what the page found, with the setting it is about."""

REMEDIES = {  # most frequent reason against a tile -> what changes it
    "judge": "the judge misses the class: a lower `strength` in 03, more steps in 02, or look at the gallery whether it is right",
    "copy": "they lie too near training tiles: a higher `strength` in 03, fewer steps in 02, or `stains: all`",
    "repeat": "they repeat each other: more sources, another `policy`, or fewer tiles",
    "blank": "they are blank: a lower `guidance_scale`, or more steps in 02",
    "blurred": "they are blurred: more `num_inference_steps`, or a decoder fitted to your tissue (`part: decoder` in 20_pretrain)",
    "stain": "they are stained unlike real tiles: a lower `strength` or `guidance_scale`",
    "centroid": "their features lie nearer another class: a lower `strength`, or more steps in 02",
    "realism": "they lie far from every real tile: a lower `strength` or `guidance_scale`",
    "cluster": "they are not the form that was asked for: more steps in 02, `words: learned` in 10, or no `thresholds: {cluster: 1}`",
    "person": "people turned them down: their notes say more than any score",
    "quota": "the quota cut them: raise it where more should be kept",
}


def after_dataset(held):
    """After 00; held: data.Dataset."""
    if not held.tail:
        yield "No class is rare here: raise `tail_below`, give one `role: tail`, or make one rare on purpose by `budget`."
        return
    lacking = [name for name in held.tail if name in held.cannot_be_evaluated]
    if lacking:
        yield f"A test case of {', '.join(lacking)} would be worth more than any tile that can be made: without one nothing is shown."
    yield f"02_lora teaches the base {', '.join(held.tail)}; params/first_look.yaml is a recipe of the whole way for tiles of your own."


def after_training(history, step):
    """After 01 or 02; history: DataFrame of `loop.fit`, `step`: id of this step."""
    last, best = int(history["step"].iloc[-1]), history.attrs.get("best_step")
    if best is None:
        yield "Nothing was held out, so only the samples above say when to stop. 03 draws with it."
    elif best >= last:
        yield f"The held-out error was least at the last step: more may help, -p {step}.steps={2 * last}. 03 draws with it."
    elif best <= last / 3:
        yield f"The held-out error was least at step {best} of {last}: fewer steps, or half the rate, would do. 03 draws with it."
    else:
        yield f"The held-out error was least at step {best} of {last}. 03 draws with it; its `strength` decides how much of a tile stays."


def after_making(made):
    """After 03 or 04; made: its manifest."""
    if len(made):
        yield "05 says which of them to keep. Too like their sources: raise `strength`. The class is gone: lower it, or train 02 longer."


def after_selection(accepted):
    """After 05; accepted: of `selection.acceptance`."""
    kept = accepted.loc[accepted["status"].eq("kept")]
    turned = accepted[accepted["status"].ne("kept") & accepted["tiles"].gt(0)].sort_values("tiles", ascending=False)
    if len(turned) and turned["why"].iloc[0] in REMEDIES and (not kept["tiles"].sum() or kept["share"].sum() < 0.5):
        yield f"Fewer than half are kept. The commonest reason: {REMEDIES[turned['why'].iloc[0]]}."
    if kept["tiles"].sum():
        yield "06 trains with the kept ones beside repeated real tiles; 08 asks what they are like. A person's verdict in the gallery wins."


def after_arms(names):
    """After 06; names: of its arms."""
    if len(names) > 1:
        yield f"07 compares {', '.join(names)} on test tiles; nothing above has seen one."


def after_fidelity(gates, likeness):
    """After 08; gates: {class: memorisation.Gate}; likeness: of `likeness.fidelity`."""
    held = [name for name, gate in gates.items() if gate.state not in ("pass", "uncalibrated")]
    if held:
        yield (
            f"The set of {', '.join(held)} holds more near copies than chance. 05 asks each tile alone, and quarantines one that lies "
            "nearer than known copies do; here the set is asked, so both can be right. Look at the pairs above, then raise `strength` or "
            "take fewer steps in 02; until then `export` keeps them in the house."
        )
    if likeness["reading"].str.startswith("farther").any():
        yield "Tiles farther from real ones than another case is: more steps in 02, a lower `strength`, or a decoder fitted to your tissue."
    yield "Whether they help is the question of 07."


def after_verdict(differences, n):
    """After 07; differences: {endpoint: facts} of the judged arm as in results.json, n: its counts."""
    from histokit.evaluate import verdict  # not for the pages before it

    outcome = differences[verdict.TAIL]["outcome"]
    if outcome in ("few cases", "absent"):
        yield "Cases decide here: eight test cases of each rare class carry an interval, however many tiles are made."
    elif outcome == "few seeds":
        yield "More classifier seeds carry an interval: `seeds: 6` in the step that trained the arms."
    elif outcome == "none":
        yield (
            "Before making other tiles, ask what any could bring: arms with `real_tiles` from new cases, or a look at 00's ceilings. If "
            "there is room: `strength` in 03, steps in 02, and 05's gallery, one at a time."
        )
    elif outcome == "fewer":
        yield "They did harm: fewer of them (`per_class`, `synthetic_share`), stricter cuts in 05, or recoloured real tiles in their place."
    if outcome in ("none", "more", "fewer") and n["draws"] < 2:
        yield "One draw of the rare tiles and one generator: `--draws 3 --generator-seeds 2` says how much of this was luck."
