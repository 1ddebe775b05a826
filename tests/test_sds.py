"""Score distillation: hand-worked numbers, formulas, schedules, and a tiny run with a stand-in model."""
import math
import types
from dataclasses import replace

import pytest
import torch

import data
import sds

torch.set_num_threads(1)


class Schedule:
    """Two noise levels whose square roots are short decimals: t = 0 is alpha .8, sigma .6; t = 1 is .6, .8."""
    alphas_cumprod = torch.tensor([0.64, 0.36], dtype=torch.float64)

    def predict_x0(self, x_t, t, noise):
        a = self.alphas_cumprod.to(x_t)[t].view(-1, 1, 1, 1)
        return (x_t - (1 - a).sqrt() * noise) / a.sqrt()

    def add_noise(self, x0, t, noise):
        a = self.alphas_cumprod.to(x0)[t].view(-1, 1, 1, 1)
        return a.sqrt() * x0 + (1 - a).sqrt() * noise


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
    x0 = sds.x0_target(Schedule(), column(2), torch.tensor([0]), column(1), column(0.5), 2.0, 0.0, 1)
    assert x0.item() == pytest.approx(1.375)


def test_rescale_by_hand():
    # One set of two views. Guided (0, 4): std sqrt(8); text (1, 2): std sqrt(.5); r = 1/4; phi = .5 -> factor .625.
    out = sds.rescale_contrast(column(0, 4), column(1, 2), 0.5, num_views=2)
    assert out.flatten().tolist() == pytest.approx([0, 2.5])


def test_rescale_is_one_factor_a_set():
    _, _, _, a, b, _ = random_step(8)
    b[4:] *= 3
    out = sds.rescale_contrast(a, b, 1.0, num_views=4)
    for s in (slice(0, 4), slice(4, 8)):
        assert out[s].std().item() == pytest.approx(b[s].std().item())      # phi = 1: the text's contrast exactly
        factor = out[s] / a[s]
        assert torch.allclose(factor, factor.flatten()[0].expand_as(factor))
    whole = sds.rescale_contrast(a, b, 1.0, num_views=8)
    assert not torch.allclose(whole, out)


def test_threshold_by_hand():
    # Imagen on pixels: |x0| = 0 1 2 3 4, median 2: clip to +-2, divide by 2.
    x0 = torch.tensor([0.0, -1, 2, 3, -4]).view(1, 1, 1, 5)
    assert sds.dynamic_threshold(x0, 0.5, 1).flatten().tolist() == [0, -0.5, 1, 1, -1]
    assert torch.equal(sds.dynamic_threshold(x0 / 8, 0.5, 1), x0 / 8)        # within the limit: untouched


def test_thresholded_target_has_the_range_of_the_text_prediction():
    x, t, noise, a, b, x_t = random_step()
    out = sds.x0_target(Schedule(), x_t, t, a, b, 50.0, 0.0, 4, threshold=0.9)
    text = Schedule().predict_x0(x_t, t, a)
    assert out.abs().max().item() == pytest.approx(sds.set_quantile(text, 0.9, 4).item())


# ---- Losses


def gradient_of(loss, x):
    return torch.autograd.grad(loss, x)[0]


def test_x0_loss_by_hand():
    x = column(1, 3).requires_grad_()
    loss = sds.x0_loss(x, column(0, 1))
    assert loss.item() == (1 + 4) / 2 / 2                                    # half the squares, over two pictures
    assert gradient_of(loss, x).flatten().tolist() == [0.5, 1.0]


def test_x0_is_sds_with_weight_sigma_over_alpha():
    x, t, noise, a, b, x_t = random_step()
    x.requires_grad_()
    x0 = sds.x0_target(Schedule(), x_t, t, a, b, 50.0, 0.0, 4)
    expected = 0.8 / 0.6 * (sds.guide(a, b, 50.0) - noise) / 4
    assert torch.allclose(gradient_of(sds.x0_loss(x, x0), x), expected, rtol=0, atol=1e-6)


def test_sds_loss_has_weight_one_minus_abar():
    x, t, noise, a, b, _ = random_step()
    x.requires_grad_()
    loss = sds.sds_loss(Schedule(), x, t, a, noise)
    assert torch.allclose(gradient_of(loss, x), 0.64 * (a - noise) / 4, rtol=0, atol=1e-9)


def test_sjc_is_sds_with_weight_one():
    x, t, noise, a, b, x_t = random_step()
    x.requires_grad_()
    loss = sds.sjc_loss(Schedule(), x, t, Schedule().predict_x0(x_t, t, a))
    assert torch.allclose(gradient_of(loss, x), (a - noise) / 4, rtol=0, atol=1e-9)


# ---- Schedules and draws


def test_annealing_by_the_released_numbers():
    s = sds.PRESETS["full"]
    assert [sds.timestep_range(s, step) for step in (0, 4000, 5000, 8000, 9999)] == [
        (980, 980), (500, 740), (380, 680), (20, 500), (20, 500)]


def test_switch_and_orientation_weight():
    s = sds.PRESETS["full-shaded"]
    assert [sds.phase(s, step) for step in (0, 4999, 5000, 9999)] == [0, 0, 1, 1]
    weight = lambda step: sds.ramp(s.orient, sds.progress(s, step, s.switch))
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
    assert next(d for d in draws if d is not None).shape == (1, 1, 1, 3)     # one colour for the whole step
    grey = sds.draw_background(sds.PRESETS["tiny-cpu"], 2)
    assert grey.shape == (8, 1, 1, 3) and grey.unique().numel() == 2         # one grey for each set


def test_lights_are_shared_by_a_set():
    torch.manual_seed(0)
    positions = torch.zeros(8, 3)
    lights = sds.draw_lights(positions, 4)
    assert lights[:4].unique(dim=0).shape[0] == 1 and not torch.equal(lights[0], lights[4])
    assert ((lights.norm(dim=-1) >= 0.8) & (lights.norm(dim=-1) <= 1.5)).all()


@pytest.mark.parametrize("wrong, word", [
    (dict(steps=0), "steps"), (dict(guidance=-1), "guidance"), (dict(rescale=2), "rescale"),
    (dict(batch=(6, 4)), "batch"), (dict(batch=(0, 4)), "batch"), (dict(t_min=(980, 600)), "t_min"),
    (dict(t_max=(1200, 500)), "t_max"), (dict(loss="vsd"), "loss"), (dict(threshold=-1.0), "threshold")])
def test_impossible_settings_are_named(wrong, word):
    with pytest.raises(ValueError, match=word):
        sds.check(replace(sds.FULL, **wrong))


def test_presets_are_possible():
    for s in sds.PRESETS.values():
        sds.check(s)
