"""Measure what attacks leave of a network's accuracy.

With nothing else it evaluates the newest run under its challenge's protocol. --protocol names
frozen protocols (autoattack and adaptive also take --norm, --epsilon and data of your own);
without it the attack flags (--epsilon, --num_steps, ...) describe one attack.
--attack_file scores a submission as the challenge's run_attack.py does. --model and --data take
a network and images of your own. All values are in pixel units: [0, 1] for MNIST, [0, 255] for
CIFAR.

An interrupted evaluation goes on when the same command is given again. --num_workers shares it
among processes, here or on a Ray cluster; the result is the same.
"""

from pathlib import Path

from absl import flags

from logit_reg_scripts import command_line, flag_groups
from logit_reg_scripts.command_line import FLAGS, UsageError

flag_groups.define_model_flag()
flag_groups.define_data_flags()
flag_groups.define_challenge_flags()
flag_groups.define_own_model_flags()

flags.DEFINE_list("protocol", None, "frozen protocols, as paper-fgsm,paper-mnist")
flag_groups.define_example_flags()
flags.DEFINE_bool("worst_case_only", False, "attack only what the attacks before left standing")
flag_groups.define_attack_flags("attack flag: ")
flag_groups.define_attack_dtype_flag()

flags.DEFINE_list("attack_file", None, "score these attack.npy files instead of attacking")
flags.DEFINE_string("pred_path", "pred.npy", "where --attack_file writes the predictions")
flags.DEFINE_string("store_adv_path", None, "write the worst-case images found to this .npy")
flags.DEFINE_string("output_dir", None, "folder for result.json and ledger.csv")
flags.DEFINE_integer("num_workers", 1, "processes that share the work", lower_bound=1)
flags.DEFINE_enum("runner", "local", ["local", "ray"], "where they run: here, or a Ray cluster")
flags.DEFINE_float("num_cpus", 1, "--runner=ray: cores that a worker reserves", lower_bound=0)
flags.DEFINE_float("num_gpus", 0, "--runner=ray: GPUs that a worker reserves", lower_bound=0)
flags.DEFINE_bool("worker", False, "compute batches for another process of this command only")
flags.DEFINE_bool("progress", True, "draw progress bars")


def main() -> None:
    """Evaluate as the flags say."""
    from logit_reg_scripts.attack_flags import ATTACK_FLAGS, apply_config
    from logit_reg_scripts.submissions import prepare_output

    # A protocol and a submission have their own attack; the file's would contradict it.
    has_attack = FLAGS.protocol or FLAGS.attack_file
    apply_config(without=ATTACK_FLAGS if has_attack else ())
    if FLAGS.store_adv_path and not FLAGS.attack_file:
        prepare_output(Path(FLAGS.store_adv_path))
    if FLAGS.model or FLAGS.data:
        _evaluate_own()
    else:
        _evaluate_challenge()


def _evaluate_challenge() -> None:
    from logit_reg_scripts.evaluations import TestImages, print_result, published_beside
    from logit_reg_scripts.sources import dataset_for, load_model, load_split
    from logit_reg_scripts.submissions import score_files
    from madry_compat.challenges import challenge_for
    from madry_compat.data import to_pixels

    model = load_model(FLAGS.model_dir)
    data_dir = FLAGS.data_dir or FLAGS.data_path or model.usable_data_dir
    name = dataset_for(model, FLAGS.dataset, data_dir)
    challenge = challenge_for(name)
    batch_size = FLAGS.eval_batch_size or challenge.eval_batch_size
    dataset = load_split(name, "test", data_dir, download=FLAGS.download)
    if FLAGS.attack_file:
        paths = [Path(path) for path in FLAGS.attack_file]
        score_files(
            model.network,
            paths,
            dataset,
            challenge,
            epsilon=FLAGS.epsilon,
            batch_size=batch_size,
            pred_path=Path(FLAGS.pred_path),
        )
        return

    protocols = _protocols(model, challenge)
    count = command_line.num_examples(FLAGS.num_eval_examples, len(dataset.images))
    pixels = to_pixels(dataset.images[:count], name)
    test = TestImages(
        name, pixels, dataset.labels[:count], bounds=(challenge.lower, challenge.upper)
    )
    settings = {
        "model": str(model.path),
        "canonical": dataset.canonical,
        "note": dataset.note,
        "contaminated": _is_contaminated(model, name),
        "release": model.release,
    }
    output_dir = _output_dir(model, protocols)
    result = _evaluate(
        model.network,
        test,
        protocols,
        output_dir,
        batch_size,
        settings,
        store=lambda images: _store(images, dataset, challenge),
    )
    if result is None:
        return
    print_result(result, published_beside(model.release, dataset))
    print(f"ledger: {output_dir / 'ledger.csv'}")
    if model.is_squeezed and not any(name.startswith("autoattack") for name in protocols):
        print("PGD flatters this family, run --protocol=autoattack")


def _evaluate_own() -> None:
    from logit_reg.attacks.standing import count_classes
    from logit_reg_scripts.evaluations import TestImages, print_result
    from logit_reg_scripts.own_models import load_own_model

    own = load_own_model()
    test = TestImages(own.path.stem, own.images, own.labels, (own.threat.lower, own.threat.upper))
    output_dir = Path(FLAGS.output_dir or f"runs/evaluations/{own.name}")
    num_classes = count_classes(own.network, own.images)
    protocols = _own_protocols(own.threat, num_classes)
    settings = {"model": FLAGS.model, "data": FLAGS.data}
    result = _evaluate(
        own.network, test, protocols, output_dir, FLAGS.eval_batch_size or 200, settings, _store
    )
    if result is None:
        return
    print_result(result)
    print(f"ledger: {output_dir / 'ledger.csv'}")


def _evaluate(network, test, protocols, output_dir, batch_size, settings, store) -> dict | None:
    """The content of `result.json`, or None in a worker, which leaves batches only."""
    from logit_reg.attacks.precision import followed_dtype
    from logit_reg_scripts.evaluations import (
        compute_batches,
        evaluate_protocols,
        open_state,
        print_estimate,
        read_attack_dtype,
    )
    from logit_reg_scripts.workers import run_workers

    lower = read_attack_dtype(FLAGS.attack_dtype, network, test.images, batch_size)
    options = {
        "batch_size": batch_size,
        "seed": FLAGS.random_seed,
        "worst_case_only": FLAGS.worst_case_only,
        "show_progress": FLAGS.progress,
        "gradient_logits_fn": lower,
    }
    if FLAGS.worker:
        compute_batches(network, test, protocols, open_state(output_dir, network), **options)
        return None
    print_estimate(network, test, protocols, batch_size=batch_size)
    if FLAGS.num_workers > 1:
        run_workers(output_dir, followed_dtype(lower))
    _, result = evaluate_protocols(
        network, test, protocols, output_dir, settings=settings, store=store, **options
    )
    return result


def _store(images, dataset=None, challenge=None) -> None:
    """Write the worst-case images where --store_adv_path says, if it does."""
    from logit_reg.files import write_array
    from logit_reg_scripts.submissions import write_adversarial

    if FLAGS.store_adv_path and challenge is not None:
        write_adversarial(Path(FLAGS.store_adv_path), images, dataset, challenge)
    elif FLAGS.store_adv_path:
        write_array(FLAGS.store_adv_path, images)


def _protocols(model, challenge):
    """Attacks by protocol and name, from --protocol, the attack flags or the challenge."""
    from logit_reg.protocols import any_threat_attacks, protocol_attacks
    from logit_reg_scripts.attack_flags import (
        attack_from_flags,
        challenge_threat,
        given_attack_flags,
    )

    family = "mnist" if challenge.name == "mnist" else "cifar"
    names = [name.strip() for name in FLAGS.protocol or ()]
    given = given_attack_flags()
    if names and not given:
        return {name: protocol_attacks(name, family) for name in names}
    if names:
        _refuse_attack_flags(names, given)
        threat = challenge_threat(challenge)
        suffix = f"{threat.norm}-{threat.epsilon:g}"
        # Another threat model is another attack: it never shares a column with the protocol's.
        return {
            name: {
                f"{key}-{suffix}": attack
                for key, attack in any_threat_attacks(name, threat).items()
            }
            for name in names
        }
    if not given:
        name = "madry-mnist" if family == "mnist" else "madry-cifar10"
        print(f"protocol: {name}, the challenge's own (choose with --protocol)")
        return {name: protocol_attacks(name, family)}
    return {"flags": attack_from_flags(challenge_threat(challenge), challenge)}


def _own_protocols(threat, num_classes):
    """Attacks by protocol and name on a threat model of the user's own."""
    from logit_reg.protocols import any_threat_attacks
    from logit_reg_scripts.attack_flags import attack_from_flags, given_attack_flags

    if not FLAGS.protocol:
        return {"flags": attack_from_flags(threat, None)}
    names = [name.strip() for name in FLAGS.protocol]
    _refuse_attack_flags(names, given_attack_flags())
    return {name: any_threat_attacks(name, threat, num_classes) for name in names}


def _refuse_attack_flags(names, given) -> None:
    """A protocol is frozen; the cascades alone take another threat model, and nothing else."""
    from logit_reg.protocols import ANY_THREAT
    from logit_reg_scripts.attack_flags import THREAT_FLAGS

    frozen = [name for name in names if name not in ANY_THREAT]
    if frozen:
        raise UsageError(
            f"--protocol={frozen[0]}: a protocol is frozen to its challenge's threat model; leave "
            f"out --{given[0]}, choose from {', '.join(ANY_THREAT)}, or describe the attack with "
            f"--num_steps, --step_size, --loss_func and --restarts."
        )
    other = [name for name in given if name not in THREAT_FLAGS]
    if other:
        raise UsageError(
            f"a protocol is frozen; leave out --{other[0]} or --protocol={','.join(names)}."
        )


def _is_contaminated(model, name) -> bool:
    """mnist_5k is made of MNIST's training images."""
    contaminated = model.run is not None and model.run.dataset == "mnist" and name == "mnist_5k"
    if contaminated:
        command_line.notice(
            "warning: this run was trained on mnist and mnist_5k consists of mnist's training "
            "images: the numbers are of no value and never enter a table."
        )
    return contaminated


def _output_dir(model, protocols) -> Path:
    if FLAGS.output_dir:
        return Path(FLAGS.output_dir)
    name = "-".join(protocols)
    if model.run is not None:
        return model.path / "evaluations" / name
    return Path("runs/evaluations") / f"{model.path.stem}-{name}"


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__)


if __name__ == "__main__":
    run()
