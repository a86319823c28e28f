"""Tiles with a mask each: the layout of an annotated tile, drawn in the style of a slide that may have none.

Style-Extracting Diffusion Models, Öttl et al. (2024), arXiv:2403.14429. A job table says for every image whose layout it has and whose
style, before any is made; the picture and its mask are written together and know both. Nothing here judges a tile.
"""

import dataclasses
import json
import time
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from histokit.core import files, machine, pictures, progress
from histokit.diffusion import backbone, conditioning, sampling, style_encoders, style_sampling
from histokit.generate import previews, synthetic
from histokit.tiles import augment, data, masks

VERSION = 1


@dataclass(frozen=True)
class Settings:
    """How a tile is drawn.

    Args:
        style_scale: weight of the style, 1 turns guidance off and 0 leaves the style out.
        layout_scale: weight of the layout; another than 1 needs a model trained with `layout_drop`.
        num_inference_steps: denoising steps.
        guidance_rescale: see `sampling.styled`.
        order: 2 is DPM-Solver++ (2M), 1 DDIM.
        eta: of DDIM.
        bent: share of the style pictures that are bent.
    """

    style_scale: float = 1.5
    layout_scale: float = 1.0
    num_inference_steps: int = 20
    guidance_rescale: float = 0.0
    order: int = 2
    eta: float = 0.0
    bent: float = style_sampling.BENT

    @classmethod
    def names(cls):
        """Names of the settings, and of the one that `style_pairing.lenders` reads."""
        return (*(field.name for field in dataclasses.fields(cls)), "allow_test_style")

    @classmethod
    def of(cls, asked):
        """From a dict that may hold other names."""
        return cls(**{name: value for name, value in asked.items() if name in cls.__dataclass_fields__})

    @property
    def walk(self):
        """What `sampling.sample_styled` takes."""
        own = dataclasses.asdict(self)
        return {"rescale": own.pop("guidance_rescale"), **{name: value for name, value in own.items() if name != "bent"}}


def refuse_other(found, seen, name):
    """Raises ValueError where a model took its styles from an encoder of other weights."""
    if found.config.encoder_name != (seen.identity if seen else ""):
        raise ValueError(f"{name} learned with the style encoder {found.facts.get('encoder') or found.config.encoder!r}; train it again")


# --- making ----------------------------------------------------------------------------------------------------------


@dataclass
class Maker:
    """A trained model and what its jobs are about.

    Args:
        found: conditioning.StyleLayout. model: backbone.Model. layers: masks.Layers of the data set.
        layouts: manifest rows that lend their masks. pool: style_sampling.Pool.
    """

    found: object
    model: object
    layers: object
    layouts: pd.DataFrame
    pool: object
    identity: str = ""

    def __post_init__(self):
        self.identity = self.identity or backbone.fingerprint(self.found)
        self.by_id = self.layouts.drop_duplicates("tile_id").set_index("tile_id")
        self.ids = {}

    def mask(self, tile_id, symmetry):
        """uint8 [px, px] layer ids of a layout, as it will lie."""
        if tile_id not in self.ids:
            self.ids[tile_id] = masks.pixels(self.by_id.loc[[tile_id]].reset_index(), self.layers, self.model.tile_px)[0]
        return augment.symmetry(torch.from_numpy(self.ids[tile_id].copy()), symmetry).contiguous().numpy()

    @torch.no_grad()
    def conditions(self, row, bent=style_sampling.BENT):
        """Layout [K, h, w], style vector [dim] and mask uint8 [px, px] of one job; no image hears of another's."""
        mask = self.mask(row["tile_id"], int(row["symmetry"]))
        layout = conditioning.layout_of(mask[None], self.found.config, self.model.latent_px)[0]
        places = [self.pool.place[name] for name in json.loads(row["styles"])]
        g = torch.Generator().manual_seed(files.seed(int(row["seed"]), "style pictures"))
        v = self.found.of_style(self.pool.style([places], g, bent).to(self.model.device))[0]
        return layout, v, mask

    def make(self, jobs, settings, batch, on_step=None):
        """Images uint8 [n, H, W, 3] and masks uint8 [n, H, W] of the n jobs of one block, each in the slot its number gives it."""
        rows = jobs.to_dict("records")
        slots = [rows[0]] * batch
        for row in rows:
            slots[row["number"] % batch] = row
        last = max(row["number"] % batch for row in rows) + 1
        layout, v, mask = zip(*(self.conditions(row, settings.bent) for row in slots[:last]), strict=True)
        gens = [torch.Generator().manual_seed(int(row["seed"])) for row in slots[:last]]
        images = sampling.sample_styled(
            self.found, self.model, torch.stack(layout), torch.stack(v), gens, batch=batch, on_step=on_step, **settings.walk
        )
        place = [row["number"] % batch for row in rows]
        return images[place], np.stack(mask)[place]

    def key(self, row, settings):
        """What pixels and mask of one job follow from."""
        versions = [module.VERSION for module in (conditioning, sampling, backbone, style_encoders, style_sampling, masks)]
        layout = self.by_id.loc[row["tile_id"]]
        styles = self.pool.tiles.set_index("tile_id")["sha256"].loc[json.loads(row["styles"])].tolist()
        asked = [layout["sha256"], files.sha256(masks.path_of(layout)), row["symmetry"], styles, row["seed"]]
        known = [
            self.model.identity.get("vae"),
            self.identity,
            files.plain(vars(self.pool.settings)),
            files.plain(dataclasses.asdict(settings)),
        ]
        return files.digest("style_layout", VERSION, versions, asked, known)


def blocks(jobs, batch):
    """Index labels of the jobs that share a batch: `number // batch` of a class, whatever else is to be made."""
    return [block.index.tolist() for _, block in jobs.groupby(["class", jobs["number"] // batch], sort=False)]


def render(maker, jobs, run, tiles, settings, *, batch=None):
    """Make every tile and mask of the job table that is not there yet, and return the manifest rows of all of them.

    An interrupted run goes on where it was. Pictures lie in tiles/, masks in masks/, whose values are the ids of the layers.

    Args:
        maker: Maker. jobs: of `job_table`. tiles: manifest, for micrometres per pixel.
        batch: images per batch, by default `sampling.batch_size(model)`; job i has slot i % batch.
    """
    batch, jobs = batch or sampling.batch_size(maker.model), jobs.reset_index(drop=True)
    paths, drawn = ([run.path(folder, f"{job}.png") for job in jobs["job"]] for folder in ("tiles", "masks"))
    keys = [maker.key(row, settings) for row in jobs.to_dict("records")]
    missing = {i for i, key in enumerate(keys) if not (synthetic.there(paths[i], key, run) and synthetic.there(drawn[i], key, run))}
    count, clock, show = 0, time.perf_counter(), progress.Progress(len(missing))
    with synthetic.Writer() as write:
        for block in blocks(jobs, batch):
            if missing.isdisjoint(block):
                continue
            images, found = maker.make(jobs.loc[block], settings, batch)
            write.settle()
            for i, image, mask in zip(block, images, found, strict=True):
                if i in missing:
                    told = {"layout": jobs.at[i, "tile_id"], "styles": json.loads(jobs.at[i, "styles"])}
                    write(drawn[i], mask, keys[i], jobs.loc[i], **told)  # the mask first: a tile without one would be none
                    write(paths[i], image, keys[i], jobs.loc[i], **told)
            count += len(missing & set(block))
            show({"step": count, "images_per_s": count / (time.perf_counter() - clock), "peak_gb": machine.peak_gb()}, None)
    run.note(images_made=count, images_reused=len(jobs) - len(missing), batch=batch)
    run.note(images_per_s=synthetic.speed(run, count, time.perf_counter() - clock))
    used = files.plain(dataclasses.asdict(settings)) | {"model": maker.identity, "batch": batch}

    def told(row, path):
        own = {"symmetry": int(row.symmetry), "style_home": row.style_home, "pairing": row.pairing}
        return {"method": "style_layout", "settings": used | own, "scores": {}}

    made = synthetic.manifest(run, jobs, paths, tiles, maker.model.tile_px, told)
    place = run.folder.relative_to(files.root() / "outputs" / run.experiment / run.step)
    home = str(files.root() / "outputs" / run.experiment / run.step)
    sources = [json.dumps([layout, *json.loads(styles)]) for layout, styles in zip(jobs["tile_id"], jobs["styles"], strict=True)]
    return made.assign(mask=[(place / "masks" / path.name).as_posix() for path in drawn], sources=sources, folder=home)


def sheet(model, layers, layouts, pool, settings, seed=0, rows=3, columns=4):
    """What `training.style_layout.fit` takes as `sheet`: some layouts (rows) in some styles (columns), at fixed seeds.

    The layouts themselves stand in front, their styles above.
    """
    homes = [pool.homes[i] for i in np.linspace(0, len(pool.homes) - 1, min(columns, len(pool.homes))).astype(int)]
    some = layouts.sort_values("tile_id").groupby("label", group_keys=False).head(1).head(rows)

    def of(found):
        def drawn(step):
            maker = Maker(found, model, layers, layouts, pool, identity="while it learns")
            show = Previewer(maker, settings, seed)
            show.layouts, show.homes = some["tile_id"].tolist(), homes
            cells = [[show(layout=r, style=c) for c in range(len(homes))] for r in range(len(some))]
            px = model.tile_px
            above = [np.full((px, px, 3), 255, np.uint8), *(cell.sources[0][:, px:] for cell in cells[0])]
            lines = [np.concatenate([row[0].sources[0][:, :px], *(cell.images[0] for cell in row)], axis=1) for row in cells]
            return np.concatenate([np.concatenate(above, axis=1), *lines])

        return drawn

    return of


def sliders(settings, layouts, homes, free):
    """{name: (value, least, most, step)} of what a panel may turn: whose layout, whose style, both scales, steps.

    Args:
        layouts, homes: how many there are to choose from. free: whether the model can weigh the layout.
    """
    found = {"layout": (0, 0, max(1, layouts - 1), 1), "style": (0, 0, max(1, homes - 1), 1)}
    found["style_scale"] = (settings.style_scale, 0.0, 6.0, 0.25)
    if free:
        found["layout_scale"] = (settings.layout_scale, 0.0, 6.0, 0.25)
    return found | {"num_inference_steps": (settings.num_inference_steps, 5, 50, 5)}


class Previewer:
    """`previewer(layout=.., style=.., style_scale=..)` -> previews.Preview of a layout in a style, at one seed; remembered once drawn.

    What stands beside it as its source is the layout on its own tile, and a tile of the style.
    """

    def __init__(self, maker, settings, seed=0, most=40):
        self.maker, self.settings, self.seed, self.drawn = maker, settings, seed, {}
        self.layouts = maker.layouts.sort_values("tile_id").groupby("case_id", group_keys=False).head(2).head(most)["tile_id"].tolist()
        self.homes = maker.pool.homes[:most]

    def _job(self, layout, style, seed):
        layout, home = self.layouts[min(int(layout), len(self.layouts) - 1)], self.homes[min(int(style), len(self.homes) - 1)]
        g = torch.Generator().manual_seed(files.seed(self.seed, "preview", home))
        styles = self.maker.pool.tiles["tile_id"].iloc[self.maker.pool.of(home, g)].tolist()
        row = {
            "job": "preview",
            "class": "",
            "number": 0,
            "tile_id": layout,
            "symmetry": 0,
            "styles": json.dumps(styles),
            "style_home": home,
        }
        return pd.DataFrame(
            [row | {"seed": files.seed(self.seed if seed is None else seed, "preview"), "prompt": f"in the style of {home}"}]
        )

    def _key(self, layout, style, seed, changes):
        return int(layout), int(style), seed, dataclasses.replace(self.settings, bent=0.0, **changes)

    def __call__(self, on_step=None, layout=0, style=0, seed=None, **changes):
        key = self._key(layout, style, seed, changes)
        jobs = self._job(layout, style, seed)
        if key not in self.drawn:
            self.drawn[key] = self.maker.make(jobs, key[-1], 1, on_step)
        images, mask = self.drawn[key]
        return previews.Preview(images, self._sources(jobs, mask), key[-1].num_inference_steps, jobs)

    def _sources(self, jobs, mask):
        own = data.pixels(self.maker.by_id.loc[[jobs["tile_id"].iloc[0]]].reset_index(), self.maker.model.tile_px)[0]
        style = self.maker.pool.tiles.iloc[[self.maker.pool.place[json.loads(jobs["styles"].iloc[0])[0]]]]
        return np.concatenate([pictures.outlined(own, mask[0]), data.pixels(style, self.maker.model.tile_px)[0]], axis=1)[None]

    def known(self, layout=0, style=0, seed=None, **changes):
        """The same, where it was drawn before; else None."""
        return self(layout=layout, style=style, seed=seed, **changes) if self._key(layout, style, seed, changes) in self.drawn else None

    @property
    def can_rest(self):
        """Whether `rest` gives memory back."""
        return self.maker.model.device.type != "cpu"

    def rest(self):
        """Gives the memory of the accelerator back until something is drawn again."""
        self.maker.model.rest()


# --- what came of it -------------------------------------------------------------------------------------------------


@torch.no_grad()
def vectors(found, pool, tiles, seed=0):
    """Style vectors [N, dim] of manifest rows, each by a draw of other tiles of its slide, as in training."""
    found_v = []
    for name in tiles["tile_id"]:
        g = torch.Generator().manual_seed(files.seed(seed, "style vectors", name))
        found_v.append(found.of_style(pool.style([pool.beside(name, g)], g).to(found.null.device))[0].cpu())
    return torch.stack(found_v).numpy()


def beside(maker, jobs, made, most=12):
    """Some finished tiles beside what they were made from: DataFrame layout, style, made (uint8 [H, W, 3]), caption."""
    rows, chosen = [], np.linspace(0, len(made) - 1, min(most, len(made))).astype(int)
    for i in chosen:
        job, px = jobs.iloc[i], maker.model.tile_px
        own = augment.pixel_symmetry(data.pixels(maker.by_id.loc[[job["tile_id"]]].reset_index(), px), int(job["symmetry"]))[0]
        mask = maker.mask(job["tile_id"], int(job["symmetry"]))
        style = data.pixels(maker.pool.tiles.iloc[[maker.pool.place[json.loads(job["styles"])[0]]]], px)[0]
        picture = pictures.outlined(data.pixels(made.iloc[[i]], px)[0], mask)
        rows.append(
            {
                "layout": pictures.outlined(own, mask),
                "style": style,
                "made": picture,
                "caption": f"{job['class']} in the style of {job['style_home']}",
            }
        )
    return pd.DataFrame(rows)


def remarks(made, run, said=""):
    """Plain sentences on a finished set."""
    told = [said] if said else []
    if not len(made):
        return [*told, "No tile was asked for: the denoiser alone was trained."]
    homes = pd.Series([json.loads(text)["style_home"] for text in made["settings"]])
    layouts = pd.Series([json.loads(text)[0] for text in made["sources"]])
    told.append(f"{len(made):,} tiles with masks: {layouts.nunique():,} layouts in the style of {homes.nunique():,} slides or patients.")
    if rate := run.record["notes"].get("images_per_s"):
        told.append(f"{1 / rate:.1f} s a tile.")
    return told


def taken_over(run, step, model, seen):
    """(StyleLayout that an earlier step trained, how its style pictures are drawn), on this base.

    Raises ValueError where it learned in other latents or took its styles from another encoder.
    """
    found = conditioning.load(run.parent(step, ""), model, run.device)
    refuse_other(found, seen, step)
    return found, style_sampling.Settings(**found.facts["sampling"])
