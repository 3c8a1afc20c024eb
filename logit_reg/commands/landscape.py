"""Draw the loss around test images, along an adversarial and a random direction.

Several models, as --model_dir=A,B,C, stand side by side on one colour scale. Writes into
--output_dir: landscape.npz with landscape.json (the arrays and their settings), figures as .svg,
and landscape.html with everything. --curves adds accuracy against epsilon, steps, step size and
restarts, and histograms of the final losses. --redraw makes figures from the arrays of an earlier
call, without a model.
"""

from absl import flags

from logit_reg.commands import command_line, flag_effects, flag_groups
from logit_reg.commands.command_line import FLAGS
from logit_reg.messages import UsageError, existing_path

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
flags.DEFINE_enum("norm", None, flag_groups.NORMS, "norm (linf)")
flags.DEFINE_float("epsilon", None, "unit of both axes, pixel units; the challenge's")
flags.DEFINE_integer("num_steps", None, "--direction=pgd: steps; the challenge's")
flags.DEFINE_float("step_size", None, "--direction=pgd: step size, pixel units; the challenge's")
flags.DEFINE_float("extent", 2.0, "half the side of the square, in epsilons")
flags.DEFINE_integer("num_points", 31, "points on each axis, odd")
flags.DEFINE_bool("clip", False, "clip each point to the pixel range")
flags.DEFINE_bool("curves", False, "also draw accuracy against the knobs of the attack (slow)")
flags.DEFINE_integer("eval_batch_size", None, "images at once (200 or 100)", lower_bound=1)
flags.DEFINE_string(
    "output_dir", None, "folder for arrays, figures and page; landscapes/ of the run"
)
flags.DEFINE_string("redraw", None, "landscape.npz of an earlier call, to draw again")
flags.DEFINE_bool("progress", True, "draw progress bars")


def check_flags() -> None:
    """Refuse flags that have no effect."""
    flag_effects.refuse_without_effect(flag_effects.LANDSCAPE)


def main() -> None:
    """Compute or load a landscape and draw it."""
    from logit_reg.commands import records
    from logit_reg.experiments.landscapes import (
        LandscapeSettings,
        compute_landscape,
        draw_landscape,
        load_landscape,
        shared_dataset,
    )
    from logit_reg.experiments.sources import load_split

    output_dir = records.optional_path("output_dir")
    if FLAGS.redraw:
        path = existing_path("redraw", FLAGS.redraw)
        comparison, curves = load_landscape(path)
        folder = output_dir or path.parent
    else:
        models = [records.given_model(value) for value in FLAGS.model_dir or [None]]
        data_dir = records.data_dir(models[0])
        name = shared_dataset(models, FLAGS.dataset, data_dir)
        flag_effects.refuse_without_effect(flag_effects.LANDSCAPE, dataset=name)
        dataset = load_split(name, "test", data_dir, download=FLAGS.download)
        settings = LandscapeSettings(
            attack=records.attack_choice(),
            direction=FLAGS.direction,
            extent=FLAGS.extent,
            num_points=FLAGS.num_points,
            clip=FLAGS.clip,
            num_examples=FLAGS.num_eval_examples,
            chosen=_examples(),
            seed=FLAGS.random_seed,
            batch_size=FLAGS.eval_batch_size,
            with_curves=FLAGS.curves,
            output_dir=output_dir,
            show_progress=FLAGS.progress,
        )
        folder, comparison, curves = compute_landscape(models, dataset, settings)
    print(f"page: {draw_landscape(folder, comparison, curves)}")


def _examples() -> tuple[int, ...]:
    try:
        return tuple(int(place) for place in FLAGS.examples)
    except ValueError as error:
        raise UsageError(
            f"--examples must be places of test images, as 0,7; got {','.join(FLAGS.examples)!r}."
        ) from error


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__, check_flags=check_flags)


if __name__ == "__main__":
    run()
