"""Score distillation: hand-worked numbers, formulas, schedules, small runs."""
import math
import types
from dataclasses import replace

import pytest
import torch

import data
import sds

torch.set_num_threads(1)


class Schedule:
    """Two noise levels with short roots: t = 0 is alpha .8, sigma .6; t = 1 is the reverse."""
    alphas_cumprod = torch.tensor([0.64, 0.36], dtype=torch.float64)

    def alpha_sigma(self, t):
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()

    def predict_x0(self, x_t, t, noise):
        alpha, sigma = self.alpha_sigma(t)
        return (x_t - sigma * noise) / alpha

    def add_noise(self, x0, t, noise):
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * noise


def column(*values):
    """One number a view -> (N, 1, 1, 1)."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def random_step(num=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(num, 4, 3, 3, generator=g, dtype=torch.float64)
    x, noise, noise_text, noise_uncond = draw(), draw(), draw(), draw()
    t = torch.ones(num, dtype=torch.int64)
    return x, t, noise, noise_text, noise_uncond, Schedule().add_noise(x, t, noise)


# ---- Guidance and the clamps


def test_guidance_by_hand():
    assert sds.guide(3.0, 1.0, 50.0) == 101.0
    assert sds.guide(3.0, 1.0, 1.0) == 3.0
    assert sds.guide(3.0, 1.0, 0.0) == 1.0


def test_x0_target_by_hand():
    # alpha .8, sigma .6; x_t = 2; text 1, uncond .5, scale 2 -> eps_hat 1.5; x0 = (2 - .9) / .8
    x0 = sds.x0_target(Schedule(), column(2), torch.tensor([0]), column(1), column(.5), 2.0, 0.0, 1)
    assert x0.item() == pytest.approx(1.375)


def test_rescale_by_hand():
    # Two views. Guided 0, 4: std sqrt(8); text 1, 2: std sqrt(.5); r = 1/4; phi .5 -> factor .625
    out = sds.rescale_contrast(column(0, 4), column(1, 2), 0.5, num_views=2)
    assert out.flatten().tolist() == pytest.approx([0, 2.5])


def test_rescale_is_one_factor_a_set():
    _, _, _, a, b, _ = random_step(8)
    b[4:] *= 3
    out = sds.rescale_contrast(a, b, 1.0, num_views=4)
    for s in (slice(0, 4), slice(4, 8)):
        assert out[s].std().item() == pytest.approx(b[s].std().item())  # phi = 1: just that
        factor = out[s] / a[s]
        assert torch.allclose(factor, factor.flatten()[0].expand_as(factor))
    whole = sds.rescale_contrast(a, b, 1.0, num_views=8)
    assert not torch.allclose(whole, out)


def test_threshold_by_hand():
    # Imagen on pixels, limit 1: |x0| = 0 1 2 3 4, median 2: clip to +-2, divide by 2.
    x0 = torch.tensor([0.0, -1, 2, 3, -4]).view(1, 1, 1, 5)
    ones = torch.ones_like(x0)
    assert sds.dynamic_threshold(x0, ones, 0.5, 1).flatten().tolist() == [0, -0.5, 1, 1, -1]
    assert torch.equal(sds.dynamic_threshold(x0 / 8, ones, 0.5, 1), x0 / 8)     # within the limit


def test_thresholded_target_ends_where_the_unguided_one_does():
    x, t, noise, a, b, x_t = random_step()
    out = sds.x0_target(Schedule(), x_t, t, a, b, 50.0, 0.0, 4, threshold=0.9)
    text = Schedule().predict_x0(x_t, t, a)
    assert out.abs().max().item() == pytest.approx(text.abs().quantile(0.9).item())


# ---- Losses


def gradient_of(loss, x):
    return torch.autograd.grad(loss, x)[0]


def test_x0_loss_by_hand():
    x = column(1, 3).requires_grad_()
    loss = sds.x0_loss(x, column(0, 1))
    assert loss.item() == (1 + 4) / 2 / 2     # half the squares, over two pictures
    assert gradient_of(loss, x).flatten().tolist() == [0.5, 1.0]


def test_x0_is_sds_with_weight_sigma_over_alpha():
    x, t, noise, a, b, x_t = random_step()
    x.requires_grad_()
    x0 = sds.x0_target(Schedule(), x_t, t, a, b, 50.0, 0.0, 4)
    expected = 0.8 / 0.6 * (sds.guide(a, b, 50.0) - noise) / 4
    assert torch.allclose(gradient_of(sds.x0_loss(x, x0), x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss, weight", [(sds.sds_loss, 0.64), (sds.sjc_loss, 1.0)])
def test_sds_and_sjc_by_their_weights(loss, weight):
    """The gradient is w(t) (noise_hat - noise): 1 - abar_t for SDS, 1 for SJC."""
    x, t, noise, a, b, x_t = random_step()
    x.requires_grad_()
    x0_hat = Schedule().predict_x0(x_t, t, a)
    expected = weight * (a - noise) / 4
    assert torch.allclose(gradient_of(loss(Schedule(), x, t, x0_hat), x), expected, rtol=0,
                          atol=1e-9)


# ---- Schedules and draws


def test_annealing_by_the_released_numbers():
    s = sds.PRESETS["full"]
    assert [sds.timestep_range(s, step) for step in (0, 4000, 5000, 8000, 9999)] == [
        (980, 980), (500, 740), (380, 680), (20, 500), (20, 500)]


def test_switch_and_orientation_weight():
    s = sds.PRESETS["full-shaded"]
    assert [sds.phase(s, step) for step in (0, 4999, 5000, 9999)] == [0, 0, 1, 1]
    weight = lambda step: sds.ramp(s.orient, s, step, s.switch)
    assert (weight(0), weight(2500), weight(5000), weight(9999)) == (10, 505, 1000, 1000)


def test_shading_draws():
    s = sds.PRESETS["full-shaded"]
    torch.manual_seed(0)
    assert {sds.draw_shading(s, 4999) for _ in range(20)} == {("albedo", 0.0)}
    assert sds.draw_shading(sds.PRESETS["full"], 9000) == ("albedo", 0.0)
    draws = [sds.draw_shading(s, 5000) for _ in range(4000)]
    share = lambda name: sum(d[0] == name for d in draws) / len(draws)
    assert share("albedo") == pytest.approx(0.25, abs=0.03)
    assert share("textureless") == pytest.approx(0.375, abs=0.03)
    assert share("diffuse") == pytest.approx(0.375, abs=0.03)
    assert 0.45 < sum(d[1] for d in draws) / len(draws) < 0.55


def test_backgrounds():
    torch.manual_seed(0)
    draws = [sds.draw_background(sds.PRESETS["full"], 2) for _ in range(400)]
    assert 150 < sum(d is None for d in draws) < 250
    assert next(d for d in draws if d is not None).shape == (1, 1, 1, 3)     # one for all
    grey = sds.draw_background(sds.PRESETS["tiny-cpu"], 2)
    assert grey.shape == (8, 1, 1, 1) and grey.unique().numel() == 2         # one grey for each set


def test_lights_are_shared_by_a_set():
    torch.manual_seed(0)
    positions = torch.zeros(8, 3)
    lights = sds.draw_lights(positions, 4)
    assert lights[:4].unique(dim=0).shape[0] == 1 and not torch.equal(lights[0], lights[4])
    assert ((lights.norm(dim=-1) >= 0.8) & (lights.norm(dim=-1) <= 1.5)).all()


@pytest.mark.parametrize("wrong, word", [
    (dict(steps=0), "steps"), (dict(guidance=-1), "guidance"), (dict(rescale=2), "rescale"),
    (dict(batch=(6, 4)), "batch"), (dict(batch=(0, 4)), "batch"), (dict(t_min=(980, 600)), "t_min"),
    (dict(t_max=(1200, 500)), "t_max"), (dict(loss="vsd"), "loss"),
    (dict(threshold=-1.0), "threshold"), (dict(fov=(0, 0)), "fov"), (dict(fov=(50, 180)), "fov"),
    (dict(distance=(0, 1)), "distance")])
def test_impossible_settings_are_named(wrong, word):
    with pytest.raises(ValueError, match=word):
        sds.check(replace(sds.FULL, **wrong))


def test_presets_are_possible():
    for s in sds.PRESETS.values():
        sds.check(s)


# ---- A stand-in for the diffusion model: it sees, in any noise, one picture


class Picture(torch.nn.Module):
    """Latents are a coarser picture; in any noise the model sees a square of `color`."""
    image_size = 16

    def __init__(self, color=(0.5, -0.5, 0.0)):
        super().__init__()
        self.square = torch.nn.Parameter(torch.zeros(1, 3, 4, 4))
        self.square.data[0, :, 1:3, 1:3] = torch.tensor(color).view(3, 1, 1)
        self.schedule, self.seen = LongSchedule(), []
        self.unet = types.SimpleNamespace(project_context=lambda context: context)

    def encode_text(self, prompts):
        self.prompts = prompts
        return torch.zeros(len(prompts), 77, 8)

    def encode_images(self, images, sample=False):
        assert sample and images.shape[-2:] == (16, 16)
        return torch.nn.functional.avg_pool2d(images, 4)

    def predict_noise(self, x_t, t, context, c2w=None, num_views=1):
        self.seen.append((len(x_t), len(context), None if c2w is None else len(c2w), num_views))
        alpha, sigma = self.schedule.alpha_sigma(t)
        return (x_t - alpha * self.square) / sigma


class LongSchedule(Schedule):
    alphas_cumprod = torch.linspace(0.999, 0.005, 1000)


SMALL = replace(sds.PRESETS["tiny-cpu"], steps=6, size=(8, 12), nerf=sds.NeRFConfig(
    levels=2, log2_table=8, base_resolution=4, finest_resolution=8, hidden=16, occupancy=8,
    max_samples=16, background=None))


def run(model=None, settings=SMALL, **how):
    for now in sds.dream_steps(model or Picture(), "a duck", settings, **how):
        pass
    return now


def test_the_model_gets_what_it_should():
    model = Picture()
    run(model, replace(SMALL, steps=2, batch=(8, 4)))
    assert model.prompts == ["a duck, 3d asset", ""]
    assert model.seen == [(16, 16, 16, 4), (8, 8, 8, 4)]    # text and negative
    model = Picture()
    run(model, replace(SMALL, steps=1, guidance=1.0))
    assert model.seen == [(4, 4, 4, 4)]                         # no guidance: half the work
    model = Picture()
    run(model, replace(SMALL, steps=1, multiview=False))
    assert model.seen == [(8, 8, None, 1)]                      # 2D guidance


@pytest.mark.parametrize("loss", ["x0", "sds", "sjc"])
def test_the_object_turns_to_what_the_model_wants(loss):
    s = replace(SMALL, steps=50, loss=loss, rescale=0.0, lr_mlp=0.01, t_max=(500, 500),
                t_min=(20, 20))
    nerf = run(Picture((0.9, -0.9, 0.9)), s).nerf.eval()
    c2w = data.orbit_cameras(2)
    c2w[:, :3, 3] *= data.TOY_DISTANCE
    middle = nerf.render(*data.camera_rays(c2w, data.TOY_FOV, 8, 8), background=0.5)["rgb"][:, 4, 4]
    assert (middle[:, 0] > 0.7).all() and (middle[:, 1] < 0.3).all() and (middle[:, 2] > 0.7).all()


@pytest.mark.parametrize("shading", [False, True])
def test_an_interrupted_run_ends_as_an_unbroken_one(tmp_path, shading):
    s = replace(SMALL, shading=shading, batch=(8, 4),
                nerf=replace(SMALL.nerf, background="learned"))
    whole = run(settings=s, seed=7).nerf.state_dict()
    for now in sds.dream_steps(Picture(), "a duck", s, seed=7):
        if now.step == 2:
            now.save(tmp_path / "state.pt")
            break
    torch.manual_seed(99)
    rest = run(settings=s, seed=7, state=tmp_path / "state.pt").nerf.state_dict()
    other = run(settings=s, seed=8).nerf.state_dict()
    assert all(torch.equal(whole[name], rest[name]) for name in whole)
    assert not all(torch.equal(whole[name], other[name]) for name in whole)


@pytest.mark.parametrize("shading", [False, True])
def test_rendering_in_chunks_changes_nothing(shading, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, 0.25))
    s = replace(SMALL, steps=2, shading=shading, switch=0.0, nerf=replace(SMALL.nerf, occupancy=4))
    whole = run(settings=s)
    monkeypatch.setattr(sds, "chunk_of_rays", lambda *_: 100)
    parts = run(settings=replace(s, memory=12.0))
    assert whole.loss.item() == pytest.approx(parts.loss.item(), rel=1e-4)
    for name, value in whole.nerf.state_dict().items():
        assert torch.allclose(value, parts.nerf.state_dict()[name], atol=1e-3), name


def test_memory_bounds_the_rays():
    s = sds.PRESETS["full-shaded"]
    assert sds.chunk_of_rays(s, 8) is None
    small, large = (sds.chunk_of_rays(replace(s, memory=m), 4) for m in (8, 16))
    assert 1024 <= small < large < 4 * 256 * 256


def test_a_plain_fit_to_pictures():
    pictures = torch.full((4, 3, 16, 16), -0.5)
    pictures[:, 0, 6:10, 6:10] = 1.0
    s = replace(SMALL, steps=60, lr_mlp=0.01)
    now = run(settings=s, views=(pictures, data.orbit_cameras(4)))
    assert now.loss < 0.03


@pytest.mark.parametrize("change, word", [
    (dict(loss=torch.tensor(math.nan)), "not a number at step 3"),
    (dict(opacity=torch.tensor(0.0)), "vanished"), (dict(opacity=torch.tensor(1.0)), "fills")])
def test_a_dead_object_is_named(change, word):
    alive = sds.Progress(3, torch.tensor(1.0), torch.tensor(0.2), None, None)
    alive.check_alive()
    with pytest.raises(ValueError, match=word):
        alive._replace(**change).check_alive()


def test_dream_returns_the_object():
    nerf = sds.dream(Picture(), "a duck", replace(SMALL, steps=1))
    assert isinstance(nerf, sds.NeRF) and not nerf.training
