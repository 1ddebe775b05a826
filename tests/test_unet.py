"""The UNet: numbers by hand, properties, a slow twin read off the paper, diffusers' own network."""
import copy
import math
from dataclasses import asdict

import pytest
import torch

import layouts
import unet
from unet import UNet, UNetConfig

torch.set_num_threads(1)
SMALL = dict(model_channels=32, channel_mult=(1, 2, 2), num_res_blocks=1, attention_levels=(0, 1),
             num_head_channels=16, context_dim=24)


def random_unet(**changes):
    """Every weight random, those that start at zero as well."""
    torch.manual_seed(0)
    network = UNet(UNetConfig(**(SMALL | changes))).eval().requires_grad_(False)
    for p in network.parameters():
        if p.abs().sum() == 0:
            p.normal_(std=0.1)
    return network


def inputs(num, channels=24):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(num, 4, 8, 8, generator=g), torch.full((num,), 300),
            torch.randn(num, 5, channels, generator=g), torch.randn(num, 16, generator=g))


def test_timestep_embedding_by_hand():
    torch.testing.assert_close(unet.timestep_embedding(torch.tensor([0]), 4),
                               torch.tensor([[1., 1, 0, 0]]))
    torch.testing.assert_close(         # f = 1, 1/100
        unet.timestep_embedding(torch.tensor([2]), 4),
        torch.tensor([[math.cos(2), math.cos(0.02), math.sin(2), math.sin(0.02)]]))


def test_group_norm_written_out_is_pytorchs_and_keeps_channels_last(monkeypatch):
    torch.manual_seed(0)
    norm = unet.GroupNorm(32, 64)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = (3 + torch.randn(2, 64, 5, 7)).to(memory_format=torch.channels_last).requires_grad_()
    theirs, g = norm(x), torch.randn(2, 64, 5, 7)
    theirs_grad, = torch.autograd.grad(theirs, x, g)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    ours = norm(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(ours, x, g)[0], theirs_grad, rtol=1e-4, atol=1e-5)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert norm(x.detach().bfloat16()).dtype == torch.bfloat16


def test_parameters_at_full_size():
    with torch.device("meta"):
        network = UNet(UNetConfig())
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    assert sum(sizes.values()) == 867_572_164
    assert sum(n for name, n in sizes.items() if "camera_embed" not in name) == 865_910_724
    assert network.input_blocks[7][1].transformer_blocks[0].attn1.heads == 20


def test_names_and_shapes_at_full_size_are_diffusers():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(
            attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024,
            use_linear_projection=True)
        ours = UNet(UNetConfig())
    names = layouts.unet_names(asdict(UNetConfig()))
    translated = {layouts.rename(k, names): v.shape for k, v in theirs.state_dict().items()}
    assert translated == {k: v.shape for k, v in ours.state_dict().items() if "camera" not in k}


# ---- Properties ---------------------------------------------------------------------------------

def test_2d_mode_knows_nothing_of_views_and_cameras():
    network = UNet(UNetConfig(**SMALL)).eval()
    unet.zero(network.camera_embed[2])
    with torch.no_grad():
        for p in network.parameters():
            if p.abs().sum() == 0 and p is not network.camera_embed[2].weight:
                p.normal_(std=0.1)
        network.camera_embed[2].bias.zero_()
        x, t, context, camera = inputs(3)
        plain = network(x, t, context)
        assert torch.equal(plain, network(x, t, context, camera, num_views=1))
        for i in range(3):              # pictures of a 2D batch do not see each other
            alone = network(x[i:i + 1], t[:1], context[i:i + 1])
            torch.testing.assert_close(alone[0], plain[i], rtol=1e-4, atol=1e-5)
        # a set of equal views without cameras: to each of them, attention is what it is for one
        same = network(x[:1].repeat(4, 1, 1, 1), t[:1].repeat(4), context[:1].repeat(4, 1, 1),
                       num_views=4)
        torch.testing.assert_close(same, plain[:1].repeat(4, 1, 1, 1), rtol=1e-4, atol=1e-5)


def test_views_permute_with_their_cameras():
    network, (x, t, context, camera) = random_unet(), inputs(4)
    context = context[:1].repeat(4, 1, 1)
    order = torch.tensor([2, 0, 3, 1])
    out = network(x, t, context, camera, 4)
    torch.testing.assert_close(network(x[order], t, context, camera[order], 4), out[order],
                               rtol=1e-4, atol=1e-5)
    assert not torch.allclose(network(x, t, context, camera[order], 4), out, atol=1e-2)


def test_views_see_each_other_and_objects_do_not():
    network, (x, t, context, camera) = random_unet(), inputs(8)
    out = network(x, t, context, camera, 4)
    x2 = x.clone()
    x2[1] += 1                          # a view of the first object
    changed = (network(x2, t, context, camera, 4) - out).abs().amax(dim=(1, 2, 3))
    assert (changed[:4] > 1e-3).all() and (changed[4:] == 0).all()


def test_text_keys_and_values_computed_once():
    network, (x, t, context, camera) = random_unet(), inputs(4)
    cached = network.project_context(context)
    assert cached.shape == (4, 5, 2 * (32 + 64 + 64 + 64 + 64 + 32 + 32))   # down, middle, up
    assert torch.equal(network(x, t, cached, camera, 4), network(x, t, context, camera, 4))


def test_a_text_as_wide_as_all_keys_and_values_is_refused():
    with pytest.raises(ValueError, match="as wide"):         # 4 transformers, two layers of 32 each
        UNet(UNetConfig(model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_levels=(0,),
                        num_head_channels=32, context_dim=256))


@pytest.mark.parametrize("attention", ["none", "temporal", "new3d"])
def test_ablations_of_attention(attention):
    network, (x, t, context, camera) = UNet(UNetConfig(**SMALL, attention=attention)), inputs(4)
    reference = random_unet(attention="none")
    assert not network.load_state_dict(reference.state_dict(), strict=False).unexpected_keys
    with torch.no_grad():               # a new layer is of no effect at first, in 2D mode never
        out = network(x, t, context, camera, 4)
        torch.testing.assert_close(out, reference(x, t, context, camera, 4))
        plain = network(x, t, context)
        for name, p in network.named_parameters():
            if "attn3.to_out" in name:
                p.normal_()
        assert torch.equal(network(x, t, context), plain)
        x2 = x.clone()
        x2[1] += 1
        moved = network(x2, t, context, camera, 4) - network(x, t, context, camera, 4)
    others = moved[[0, 2, 3]].abs().amax((1, 2, 3))
    assert bool((others > 0).all()) == (attention != "none")


@pytest.mark.parametrize("camera", ["text", "none"])
def test_ablations_of_the_camera(camera):
    network, (x, t, context, c) = random_unet(camera=camera), inputs(4)
    cached = network.project_context(context)
    out = network(x, t, cached, c, 4)
    assert torch.equal(out, network(x, t, context, c, 4))
    assert torch.allclose(out, network(x, t, context, c.flip(0), 4)) == (camera == "none")
    assert torch.isfinite(network(x, t, context)).all()


def test_compiles_as_one_graph_and_runs_under_autocast():
    network, (x, t, context, camera) = random_unet(), inputs(4)
    out = network(x, t, context, camera, 4)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, context, camera, 4), out, rtol=1e-4, atol=1e-4)
    trained = copy.deepcopy(network).requires_grad_(True).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        rough = trained(x, t, context, camera, 4).float()
    rough.square().mean().backward()
    assert all(p.grad is not None for p in trained.parameters())
    assert (rough - out).norm() < 0.05 * out.norm()


# ---- The slow twin: FACTS of the paper, one einsum at a time, on a flat dict of weights ---------

def group_norm(w, name, x, eps):
    groups = x.reshape(len(x), 32, -1)
    spread = (groups.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    groups = (groups - groups.mean(-1, True)) / spread
    scale, shift = w[f"{name}.weight"], w[f"{name}.bias"]
    return groups.reshape(x.shape) * scale[:, None, None] + shift[:, None, None]


def layer_norm(w, name, x):
    x = (x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(w, name, x):
    return torch.einsum("...i,oi->...o", x, w[f"{name}.weight"]) + w.get(f"{name}.bias", 0)


def conv(w, name, x, stride=1):
    weight = w[f"{name}.weight"]
    p = weight.shape[-1] // 2
    padded = torch.zeros(*x.shape[:2], x.shape[2] + 2 * p, x.shape[3] + 2 * p, dtype=x.dtype)
    padded[:, :, p:p + x.shape[2], p:p + x.shape[3]] = x
    windows = padded.unfold(2, weight.shape[-1], stride).unfold(3, weight.shape[-1], stride)
    return torch.einsum("nihwab,oiab->nohw", windows, weight) + w[f"{name}.bias"][:, None, None]


def silu(x):
    return x / (1 + (-x).exp())


def attention(w, name, x, source, head):
    q, k, v = (linear(w, f"{name}.to_{a}", b).unflatten(-1, (-1, head))
               for a, b in (("q", x), ("k", source), ("v", source)))
    weights = (torch.einsum("nlhd,nmhd->nhlm", q, k) / head ** 0.5).softmax(-1)
    return linear(w, f"{name}.to_out.0", torch.einsum("nhlm,nmhd->nlhd", weights, v).flatten(2))


def res_block(w, name, x, emb):
    h = conv(w, f"{name}.in_layers.2", silu(group_norm(w, f"{name}.in_layers.0", x, 1e-5)))
    h = h + linear(w, f"{name}.emb_layers.1", silu(emb))[:, :, None, None]
    h = conv(w, f"{name}.out_layers.3", silu(group_norm(w, f"{name}.out_layers.0", h, 1e-5)))
    skip = f"{name}.skip_connection"
    return h + (conv(w, skip, x) if f"{skip}.weight" in w else x)


def transformer(w, name, x, context, V, head):
    n, c, height, width = x.shape
    y = torch.einsum("nchw->nhwc", group_norm(w, f"{name}.norm", x, 1e-6)).reshape(n, -1, c)
    y, block = linear(w, f"{name}.proj_in", y), f"{name}.transformer_blocks.0"
    tokens = layer_norm(w, f"{block}.norm1", y).reshape(n // V, -1, c)      # (b f) l c -> b (f l) c
    y = y + attention(w, f"{block}.attn1", tokens, tokens, head).reshape(y.shape)
    y = y + attention(w, f"{block}.attn2", layer_norm(w, f"{block}.norm2", y), context, head)
    a, b = linear(w, f"{block}.ff.net.0.proj", layer_norm(w, f"{block}.norm3", y)).chunk(2, -1)
    y = y + linear(w, f"{block}.ff.net.2", a * b * (1 + torch.erf(b / 2 ** 0.5)) / 2)
    y = linear(w, f"{name}.proj_out", y).reshape(n, height, width, c)
    return x + torch.einsum("nhwc->nchw", y)


def slow_unet(w, x, t, context, camera, V, config):
    half = config.model_channels // 2
    angle = t[:, None] * 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
    emb = torch.cat([angle.cos(), angle.sin()], 1)
    emb = linear(w, "time_embed.2", silu(linear(w, "time_embed.0", emb)))
    emb = emb + linear(w, "camera_embed.2", silu(linear(w, "camera_embed.0", camera)))

    def block(name, x):
        for i in range(3):
            part = f"{name}.{i}"
            if f"{part}.in_layers.0.weight" in w:
                x = res_block(w, part, x, emb)
            elif f"{part}.proj_in.weight" in w:
                x = transformer(w, part, x, context, V, config.num_head_channels)
            elif f"{part}.op.weight" in w:
                x = conv(w, f"{part}.op", x, stride=2)
            elif f"{part}.conv.weight" in w:
                x = conv(w, f"{part}.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
            elif f"{part}.weight" in w:
                x = conv(w, part, x)
        return x

    skips = []
    for i in range(len({name.split(".")[1] for name in w if name.startswith("input_blocks")})):
        x = block(f"input_blocks.{i}", x)
        skips.append(x)
    x = block("middle_block", x)
    for i in range(len(skips)):
        x = block(f"output_blocks.{i}", torch.cat([x, skips.pop()], 1))
    return conv(w, "out.2", silu(group_norm(w, "out.0", x, 1e-5)))


@pytest.mark.parametrize("V", [1, 4])
def test_against_the_slow_twin(V):
    network, (x, t, context, camera) = random_unet(), inputs(8)
    weights = {name: p.double() for name, p in network.state_dict().items()}
    slow = slow_unet(weights, x.double(), t, context.double(), camera.double(), V, network.config)
    fast = network(x, t, context, camera, V)
    assert (fast - slow).norm() < 1e-5 * slow.norm()
