"""A denoiser with a layout and a style: how large, where it begins, what moves, what guidance means, what comes back from disk."""

import json

import numpy as np
import pytest
import torch
from tiny import tiny_model

from histokit.diffusion import backbone, conditioning, sampling, style_encoders
from histokit.training import loop, style_layout

LAYERS = ("other", "gland")


def size(module):
    return sum(p.numel() for p in module.parameters())


def started(injection="bottleneck", seed=0, model=None, **more):
    model = model or tiny_model()
    config = conditioning.Config(
        layers=LAYERS, injection=injection, dim=16, pictures=2, style_px=16, **{**conditioning.of_base(model), **more}
    )
    return conditioning.started(model, config, seed)[0], model


def asked(found, model, batch=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, 4, 8, 8, generator=g)
    t = torch.tensor([5, 400, 990])[:batch]
    layout = conditioning.layout_of(torch.randint(2, (batch, 32, 32), generator=g), found.config, 8)
    return z, t, layout, torch.randn(batch, found.config.dim, generator=g)


def test_the_published_network_has_as_many_parameters_as_published():
    with torch.device("meta"):
        preset = style_layout.PRESETS["reference"]
        unet = {
            "kind": "UNet2DModel", "sample_size": 128, "in_channels": 6, "out_channels": 3, "block_out_channels": list(preset.widths),
            "down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3, "layers_per_block": preset.blocks,
            "attention_head_dim": preset.head_width, "norm_num_groups": preset.groups,
        }  # fmt: skip
        found = conditioning.StyleLayout(conditioning.Config(layers=LAYERS, unet=unet, encoder="swin_v2_t", dim=preset.dim))
    assert size(found.unet) == 215_229_315
    assert size(found.unet) + size(found.way) == 234_635_139
    assert size(found.mapper) == 6
    assert size(found.style) == pytest.approx(27.98e6, rel=1e-3)
    with torch.device("meta"):
        wide = dict(unet, block_out_channels=[128, 256, 512])
        assert size(conditioning.StyleLayout(conditioning.Config(layers=LAYERS, unet=wide, dim=512)).unet) == pytest.approx(
            57.6e6, rel=2e-3
        )


@pytest.mark.parametrize("injection", conditioning.INJECTIONS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_it_begins_as_the_base_that_it_goes_on_from(injection, prediction_type):
    """Neither layout nor style change anything before the first update, whatever way the style takes."""
    found, model = started(injection, model=tiny_model(prediction_type=prediction_type))
    z, t, layout, v = asked(found, model)
    with torch.no_grad():
        own = found(z, t, layout, v)
        theirs = model.predict(z, t, backbone.embed(model, [""] * 3))
    torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)


def test_a_fresh_network_walks_as_its_unet_does():
    model = tiny_model()
    asked_for = style_layout.Asked.of({"sampling": "random", "pictures": 2, "px": 16}, {"network": "tiny"})
    found, brought = style_layout.fresh(asked_for.how, asked_for.sampling, model, LAYERS)
    assert brought["copied"] == [] and found.scheduler.config.beta_end == 0.0205
    z, t, layout, v = asked(found, model)
    with torch.no_grad():
        whole = found.unet(torch.cat([z, found.mapper(layout)], 1), t).sample
        torch.testing.assert_close(found(z, t, layout, v), whole)  # style block is the identity at first


def test_of_a_base_all_is_copied_and_the_first_convolution_widened():
    model = tiny_model()
    config = conditioning.Config(layers=LAYERS, dim=16, **conditioning.of_base(model))
    found, told = conditioning.started(model, config, seed=0)
    assert told["widened"] == ["conv_in.weight"] and len(told["copied"]) == len(model.unet.state_dict()) - 1
    for name in told["copied"]:
        assert torch.equal(found.unet.state_dict()[name], model.unet.state_dict()[name])
    assert set(told["new"]) == {name for name in found.state_dict() if not name.startswith("unet.") and name != "silence"}
    odd = dict(config.unet, block_out_channels=[w * 2 for w in config.unet["block_out_channels"]])
    with pytest.raises(ValueError, match="does not fit"):
        conditioning.started(model, conditioning.Config(layers=LAYERS, dim=16, **{**conditioning.of_base(model), "unet": odd}), 0)


def learn(found, model, steps, frozen=False, pictures=None):
    """A few updates on fixed tensors; returns gradients of the style encoder's parameters at each step."""
    z, _, layout, _ = asked(found, model)
    pictures = torch.randn(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) if pictures is None else pictures
    how = style_layout.Settings(style_drop=0.0)
    if frozen:
        found.freeze_style()
    batch = {"latents": z, "layout": layout, "style": pictures}
    seen, own = [], style_layout.loss(found, found.scheduler, how)

    handle = [p.register_hook(lambda g: seen.append(float(g.abs().max()))) for p in found.style.parameters() if p.requires_grad]
    loop.fit([loop.Player("x", found.groups(1e-3, 1e-3), own)], lambda k: batch, steps, 0)
    [h.remove() for h in handle]
    return seen


def test_the_style_encoder_learns_from_the_second_update_on():
    found, model = started()
    encoder = [p.detach().clone() for p in found.style.parameters()]
    z, t, layout, _ = asked(found, model)
    vs = torch.randn(2, 1, 16).expand(-1, 3, -1)
    says = lambda v: found(z, t, layout, v).detach()  # noqa: E731
    assert torch.equal(says(vs[0]), says(vs[1]))
    seen = learn(found, model, 1)
    assert max(seen) == 0  # the block's last convolution was zero
    assert not torch.equal(says(vs[0]), says(vs[1]))
    assert max(learn(found, model, 1)) > 0
    assert all(not torch.equal(a, b) for a, b in zip(encoder, found.style.parameters(), strict=True))


def test_every_parameter_is_in_one_group_and_moves():
    for injection in conditioning.INJECTIONS:
        found, model = started(injection)
        groups = found.groups(1e-4, 1e-3)
        listed = [id(p) for group in groups for p in group["params"]]
        assert len(listed) == len(set(listed)) == len(list(found.parameters()))
        assert {id(p) for p in groups[0]["params"]} == {id(p) for p in found.unet.parameters()}
        before = {name: p.detach().clone() for name, p in found.named_parameters()}
        z, _, layout, _ = asked(found, model)
        how = style_layout.Settings(style_drop=0.5)
        batch = {"latents": z, "layout": layout, "style": torch.randn(3, 2, 3, 16, 16)}
        loop.fit([loop.Player("x", groups, style_layout.loss(found, found.scheduler, how))], lambda k, held=batch: held, 6, 0)
        still = [name for name, p in found.named_parameters() if torch.equal(before[name], p)]
        assert still == [], injection


def test_a_style_encoder_that_is_not_to_learn_stays_as_it_was_drawn():
    found, model = started()
    before = [p.detach().clone() for p in found.style.parameters()]
    learn(found, model, 3, frozen=True)
    assert all(torch.equal(a, b) for a, b in zip(before, found.style.parameters(), strict=True))
    assert not {id(p) for p in found.style.parameters()} & {id(p) for group in found.groups(1, 1) for p in group["params"]}


def moved(injection="time", **more):
    """One whose conditions count: all that begins at zero is drawn."""
    found, model = started(injection, **more)
    with torch.no_grad():
        for p in found.parameters():
            if not p.abs().sum():
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(p.numel()))
        found.unet.conv_in.weight[:, 4:].normal_(0, 0.3, generator=torch.Generator().manual_seed(9))
    return found.eval(), model


@pytest.mark.parametrize("injection", conditioning.INJECTIONS)
def test_what_is_saved_comes_back_strictly_with_every_option(root, injection):
    found, model = moved(injection, layout_drop=0.1)
    found.save(root / "it", {"steps": 7})
    again = conditioning.load(root / "it", model)
    assert again.config == found.config and again.facts == {"steps": 7} and not again.training
    z, t, layout, v = asked(found, model)
    with torch.no_grad():
        assert torch.equal(again(z, t, layout, v), found(z, t, layout, v))
    assert again.scheduler.config.prediction_type == model.scheduler.config.prediction_type
    path = root / "it" / "style_layout.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps(held | {"config": held["config"] | {"dim": 8}}))
    with pytest.raises(ValueError, match="not of one model"):
        conditioning.load(root / "it")
    with pytest.raises(FileNotFoundError, match="holds no style_layout.json"):
        conditioning.load(root)


def test_a_base_with_another_autoencoder_is_refused(root):
    found, model = moved()
    found.save(root / "it")
    model.identity = {**model.identity, "vae": "another"}
    with pytest.raises(ValueError, match="it learned with vae"):
        conditioning.load(root / "it", model)


def walked(found, model, batch=2, **scales):
    z, _, layout, v = asked(found, model, batch)
    predict = sampling.styled(found, found.scheduler, layout, v, **scales)
    with torch.no_grad():
        return predict(z, torch.tensor(400), 0), (z, layout, v)


def says(found, z, layout, v):
    with torch.no_grad():
        return found(z, torch.tensor([400]).expand(len(z)), layout, v)


def test_at_scale_one_it_is_the_conditional_prediction():
    found, model = moved()
    got, (z, layout, v) = walked(found, model)
    torch.testing.assert_close(got, says(found, z, layout, v))


def test_guidance_is_that_of_the_textbook_and_rescaling_that_of_the_paper():
    found, model = moved(layout_drop=0.1)
    _, (z, layout, v) = walked(found, model)
    null = found.null.expand(len(z), -1)
    both, bare, none = says(found, z, layout, v), says(found, z, layout, null), says(found, z, torch.zeros_like(layout), null)
    style, _ = walked(found, model, style_scale=2.5)
    torch.testing.assert_close(style, bare + 2.5 * (both - bare), rtol=1e-4, atol=1e-5)
    two, _ = walked(found, model, style_scale=2.5, layout_scale=3.0)
    torch.testing.assert_close(two, none + 3 * (bare - none) + 2.5 * (both - bare), rtol=1e-4, atol=1e-5)
    layout_alone, _ = walked(found, model, layout_scale=3.0)
    torch.testing.assert_close(layout_alone, none + 3 * (bare - none) + (both - bare), rtol=1e-4, atol=1e-5)
    zero, _ = walked(found, model, style_scale=0.0)
    torch.testing.assert_close(zero, bare, rtol=1e-4, atol=1e-5)  # the learned style of no style
    half, _ = walked(found, model, style_scale=2.5, rescale=0.5)
    spread = both.std(dim=(1, 2, 3), keepdim=True) / style.std(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(half, 0.5 * style * spread + 0.5 * style, rtol=1e-4, atol=1e-5)


def test_a_style_that_is_left_out_is_the_learned_vector():
    found, _ = moved()
    style = torch.randn(4, 2, 3, 16, 16)
    v = found.of_style(style, torch.tensor([True, False, True, False]))
    assert torch.equal(v[0], found.null) and torch.equal(v[2], found.null)
    assert torch.equal(v[[1, 3]], found.of_style(style)[[1, 3]])


def test_a_layout_cannot_be_weighed_by_a_model_that_always_had_one():
    found, model = moved()
    with pytest.raises(ValueError, match="train with layout_drop"):
        walked(found, model, layout_scale=2.0)
    with pytest.raises(ValueError, match="guidance_rescale is a share"):
        walked(found, model, style_scale=2.0, rescale=1.5)


def test_an_image_does_not_depend_on_its_neighbours():
    found, model = moved()
    _, _, layout, v = asked(found, model, 3)
    gens = lambda: [torch.Generator().manual_seed(k) for k in (3, 4, 5)]  # noqa: E731
    how = {"num_inference_steps": 3, "style_scale": 1.5, "batch": 2}
    all_three = sampling.sample_styled(found, model, layout, v, gens(), **how)
    alone = sampling.sample_styled(found, model, layout[:1], v[:1], gens()[:1], **how)
    last = sampling.sample_styled(found, model, layout[2:], v[2:], gens()[2:], **how)
    assert all_three.shape == (3, 32, 32, 3) and all_three.dtype == np.uint8
    assert (all_three[0] == alone[0]).all() and (all_three[2] == last[0]).all()


def test_layouts_of_more_layers_than_learned_are_refused():
    found, _ = moved()
    with pytest.raises(ValueError, match="holds layer 2, the model knows 2"):
        conditioning.layout_of(torch.full((1, 32, 32), 2), found.config, 8)


# --- style encoders --------------------------------------------------------------------------------------------------


def style(kind="tiny_cnn", aggregation="mean", count=3, seed=0, **more):
    torch.manual_seed(seed)
    return style_encoders.Style(kind, aggregation, 16, count, **more).eval()


@pytest.mark.parametrize("kind", ["tiny_cnn", "colour"])
@pytest.mark.parametrize("aggregation", ["mean", "max"])
def test_mean_and_max_take_any_number_in_any_order(kind, aggregation):
    of, pictures = style(kind, aggregation), torch.rand(2, 5, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        v = of(pictures)
        assert v.shape == (2, 16)
        torch.testing.assert_close(of(pictures[:, [3, 1, 4, 0, 2]]), v)
        torch.testing.assert_close(of(torch.cat([pictures, pictures], 1)), v)


@pytest.mark.parametrize("aggregation", ["linear", "svit"])
def test_linear_and_svit_want_the_number_they_were_built_for(aggregation):
    of, pictures = style(aggregation=aggregation), torch.rand(2, 3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert of(pictures).shape == (2, 16)
        assert not torch.allclose(of(pictures[:, [1, 2, 0]]), of(pictures))  # order matters
        with pytest.raises(ValueError, match="built for 3 style pictures"):
            of(pictures[:, :2])


def test_no_style_is_zero_and_has_nothing_to_learn():
    of = style(aggregation="none")
    assert not list(of.parameters()) and not of(torch.rand(2, 1, 3, 8, 8)).any()
    assert not [name for name, _ in style(aggregation="svit").named_parameters() if name.startswith("each")]


def test_colour_sees_no_shape():
    of, pictures = style("colour", count=1), torch.rand(1, 1, 3, 16, 16) * 2 - 1
    shuffled = pictures.flatten(3)[..., torch.randperm(256)].unflatten(3, (16, 16))
    with torch.no_grad():
        torch.testing.assert_close(of(pictures), of(shuffled))
        assert not torch.allclose(of(pictures), of(pictures * 0.5))
        assert not torch.allclose(style(count=1)(pictures), style(count=1)(shuffled))


def test_features_of_a_frozen_encoder_take_the_place_of_pictures():
    of = style("features", width=24)
    assert of(torch.randn(2, 3, 24)).shape == (2, 16)
    with pytest.raises(ValueError, match="width of the features"):
        style("features")
    with pytest.raises(ValueError, match="svit reads pictures"):
        style("features", "svit", width=24)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: style("resnet"), "style encoder 'resnet' is unknown"),
        (lambda: style(aggregation="sum"), "aggregation 'sum' is unknown"),
        (lambda: style(aggregation="svit", px=256), "at most 128 px"),
        (lambda: conditioning.Config(layers=LAYERS, unet={}, injection="adagn"), "style_injection 'adagn' is unknown"),
        (lambda: conditioning.Config(layers=LAYERS, unet={}, injection="cross"), "needs a denoiser with cross-attention"),
    ],
)
def test_what_there_is_not_is_refused_by_name(call, said):
    with pytest.raises(ValueError, match=said):
        call()
