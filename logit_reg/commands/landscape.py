"""Draw the loss around test images, along an adversarial and a random direction.

Several models, as --model_dir=A,B,C, stand side by side on one colour scale. Writes into
--output_dir: landscape.npz with landscape.json (the arrays and their settings), figures as .svg,
and landscape.html with everything. --curves adds accuracy against epsilon, steps, step size and
restarts, and histograms of the final losses. --redraw makes figures from the arrays of an earlier
call, without a model.
"""

import dataclasses
from pathlib import Path

from absl import flags

from logit_reg.commands import command_line, flag_groups
from logit_reg.commands.command_line import FLAGS, UsageError
from logit_reg.experiments import flag_effects

flags.DEFINE_list(
    "model_dir", None, "runs, .keras files, or folders or prefixes of TF1 checkpoints; newest run"
)
flag_groups.define_data_flags("data set; the runs' own if not given")
flags.DEFINE_integer("num_eval_examples", 50, "how many test images to average, from the first")
flags.DEFINE_list("examples", ["0"], "places of test images that are also drawn alone")
flags.DEFINE_integer(
    "random_seed",
    0,
    "seed of the random directions and of the attacks",
    lower_bound=0,
    upper_bound=flag_groups.LARGEST_SEED,
)

flags.DEFINE_enum("direction", "fgsm", ["fgsm", "pgd"], "the adversarial direction")
flags.DEFINE_enum("norm", None, ["linf", "l2"], "norm (linf)")
flags.DEFINE_float("epsilon", None, "unit of both axes, pixel units; the challenge's")
flags.DEFINE_integer("num_steps", None, "--direction=pgd: steps; the challenge's")
flags.DEFINE_float("step_size", None, "--direction=pgd: step size, pixel units; the challenge's")
flags.DEFINE_float("extent", 2.0, "half the side of the square, in epsilons")
flags.DEFINE_integer("num_points", 31, "points on each axis, odd")
flags.DEFINE_bool("clip", False, "clip each point to the pixel range")
flags.DEFINE_bool("curves", False, "also draw accuracy against the knobs of the attack (slow)")
flags.DEFINE_integer("eval_batch_size", None, "images at once (200 or 100)", lower_bound=1)
flags.DEFINE_string("output_dir", "runs/landscape", "folder for arrays, figures and page")
flags.DEFINE_string("redraw", None, "landscape.npz of an earlier call, to draw again")
flags.DEFINE_bool("progress", True, "draw progress bars")


def check_flags() -> None:
    """Refuse flags that have no effect."""
    flag_effects.refuse_without_effect(flag_effects.LANDSCAPE)


def main() -> None:
    """Compute or load a landscape and draw it."""
    from logit_reg.analysis.curves import load_curves
    from logit_reg.analysis.landscape import load_comparison

    if FLAGS.redraw:
        path = command_line.existing_path("redraw", FLAGS.redraw)
        comparison = load_comparison(path)
        files = [path.parent / f"curves-{i}.npz" for i in range(len(comparison.settings["models"]))]
        curves = {
            name: load_curves(file)
            for name, file in zip(comparison.settings["models"], files, strict=True)
            if file.exists()
        }
    else:
        comparison, curves = _compute()
    _draw(comparison, curves)


def _compute():
    from logit_reg.analysis.curves import CurveSettings, save_curves
    from logit_reg.analysis.landscape import Landscape, compare, save_comparison
    from logit_reg.commands.attack_flags import challenge_threat
    from logit_reg.evaluation.run import content_hash, network_hash
    from logit_reg.evaluation.units import attack_notices, threat_notices
    from logit_reg.experiments.evaluations import refuse_other_settings
    from logit_reg.experiments.sources import dataset_for, load_model, load_split
    from logit_reg.files import read_json
    from madry_compat.challenges import challenge_for
    from madry_compat.data import to_pixels

    models = [load_model(value) for value in FLAGS.model_dir or [None]]
    data_dir = FLAGS.data_dir or models[0].usable_data_dir
    names = {dataset_for(model, FLAGS.dataset, data_dir) for model in models}
    if len(names) > 1:
        raise UsageError(
            f"the models belong to {' and '.join(sorted(names))}; models side by side share their "
            f"images. Choose one with --dataset."
        )
    (dataset_name,) = names
    flag_effects.refuse_without_effect(flag_effects.LANDSCAPE, dataset=dataset_name)
    challenge = challenge_for(dataset_name)
    dataset = load_split(dataset_name, "test", data_dir, download=FLAGS.download)
    count = command_line.num_examples(FLAGS.num_eval_examples, len(dataset.images))
    images = to_pixels(dataset.images[:count], dataset_name)
    labels = dataset.labels[:count]

    threat = challenge_threat(challenge)
    adversary = _adversary(threat, challenge)
    shape = challenge.image_shape
    command_line.tell(
        threat_notices(threat, shape) if adversary is None else attack_notices([adversary], shape)
    )
    batch_size = FLAGS.eval_batch_size or challenge.eval_batch_size
    landscape = Landscape(
        threat,
        adversary,
        extent=FLAGS.extent,
        num_points=FLAGS.num_points,
        clip=FLAGS.clip,
        batch_size=batch_size,
    )
    networks = _by_name(models)
    options = {
        "num_classes": challenge.num_classes,
        "seed": FLAGS.random_seed,
        "show_progress": FLAGS.progress,
    }
    provenance = {"dataset": dataset_name, "canonical": dataset.canonical}
    content = {
        "images_sha256": content_hash(images, labels),
        "networks_sha256": {n: network_hash(network) for n, network in networks.items()},
    }
    output_dir = Path(FLAGS.output_dir)
    record = output_dir / "landscape.json"
    if record.exists():
        wanted = {
            "models": list(networks),
            "landscape": dataclasses.asdict(landscape),
            "seed": FLAGS.random_seed,
            "num_examples": count,
            **provenance,
            **content,
        }
        refuse_other_settings(output_dir, read_json(record), wanted, "--output_dir")
    comparison = compare(
        landscape,
        networks,
        images,
        labels,
        chosen=_examples(),
        settings=provenance | content | {"paths": [str(model.path) for model in models]},
        **options,
    )
    save_comparison(comparison, output_dir / "landscape.npz")
    curves = {}
    for i, (name, network) in enumerate(networks.items() if FLAGS.curves else ()):
        curves[name] = CurveSettings(threat, batch_size=batch_size).run(
            network, images, labels, settings=provenance | {"model": name}, **options
        )
        save_curves(curves[name], output_dir / f"curves-{i}.npz")
    return comparison, curves


def _draw(comparison, curves) -> None:
    from logit_reg.files import atomic_path
    from logit_reg.report import audit_figures
    from logit_reg.report.landscape_page import write_landscape_page
    from logit_reg.report.style import to_svg

    output_dir = Path(FLAGS.output_dir)
    for quantity in ("cross_entropy", "margin"):
        for kind, draw in (
            ("map", audit_figures.loss_maps),
            ("surface", audit_figures.loss_surfaces),
        ):
            with atomic_path(output_dir / f"{quantity}-{kind}.svg") as temporary:
                temporary.write_bytes(to_svg(draw(comparison, quantity)))
    write_landscape_page(output_dir / "landscape.html", comparison, curves)
    print(f"page: {output_dir / 'landscape.html'}")


def _adversary(threat, challenge):
    """PGD as the flags say, or None for FGSM."""
    from logit_reg.attacks import PGD

    if FLAGS.direction == "fgsm":
        return None
    num_steps = challenge.attack.num_steps if FLAGS.num_steps is None else FLAGS.num_steps
    step_size = FLAGS.step_size
    if step_size is None and threat.norm == "l2":
        step_size = 2.5 * threat.epsilon / max(num_steps, 1)
    elif step_size is None:
        step_size = challenge.attack.step_size
    return PGD(threat, num_steps=num_steps, step_size=step_size)


def _by_name(models):
    """Networks by the name of their folder, by the whole path where two are called the same."""
    names = [model.release or model.path.stem for model in models]
    return {
        name if names.count(name) == 1 else str(model.path): model.network
        for name, model in zip(names, models, strict=True)
    }


def _examples() -> list[int]:
    try:
        return [int(place) for place in FLAGS.examples]
    except ValueError as error:
        raise UsageError(
            f"--examples must be places of test images, as 0,7; got {','.join(FLAGS.examples)!r}."
        ) from error


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__, check_flags=check_flags)


if __name__ == "__main__":
    run()
