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

import dataclasses
import functools
from pathlib import Path

from absl import flags

from logit_reg.commands import command_line, flag_groups
from logit_reg.commands.command_line import FLAGS, UsageError
from logit_reg.commands.flag_groups import TRIAL_EXAMPLES
from logit_reg.experiments import flag_effects

flag_groups.define_model_flag()
flag_groups.define_data_flags()
flag_groups.define_challenge_flags()
flag_groups.define_own_model_flags()

flags.DEFINE_list("protocol", None, "frozen protocols, as paper-fgsm,paper-mnist")
flag_groups.define_example_flags()
flags.DEFINE_bool("trial", False, f"to try the command out: at most {TRIAL_EXAMPLES} images")
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


# Of a robust network, AutoAttack takes seconds an image.
_MOST_AUTOATTACKED = 1000


def check_flags() -> None:
    """Refuse flags that have no effect."""
    # A protocol and a submission have their own attack; the file's would contradict it.
    has_attack = FLAGS.protocol or FLAGS.attack_file
    flag_groups.apply_config(without=flag_groups.ATTACK_FLAGS if has_attack else ())
    flag_effects.refuse_without_effect(flag_effects.EVALUATION)


def main() -> None:
    """Evaluate as the flags say."""
    from logit_reg.experiments.submissions import prepare_output

    if FLAGS.trial:
        FLAGS["num_eval_examples"].value = min(
            TRIAL_EXAMPLES, FLAGS.num_eval_examples or TRIAL_EXAMPLES
        )
    if FLAGS.store_adv_path and not FLAGS.attack_file:
        prepare_output(Path(FLAGS.store_adv_path))
    if FLAGS.model or FLAGS.data:
        _evaluate_own()
    else:
        _evaluate_challenge()


def _evaluate_challenge() -> None:
    from logit_reg.experiments.evaluations import (
        EVALUATIONS,
        TestImages,
        network_name,
        print_result,
        published_beside,
    )
    from logit_reg.experiments.sources import RUNS, dataset_for, load_model, load_split
    from logit_reg.experiments.submissions import score_files
    from madry_compat.challenges import challenge_for
    from madry_compat.data import to_pixels

    model = load_model(FLAGS.model_dir)
    data_dir = FLAGS.data_dir or FLAGS.data_path or model.usable_data_dir
    name = dataset_for(model, FLAGS.dataset, data_dir)
    flag_effects.refuse_without_effect(flag_effects.EVALUATION, dataset=name)
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

    protocols = challenge_protocols(challenge)
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
    if model.run is not None and model.finished_steps is not None:
        training = {
            "steps_done": model.finished_steps,
            "steps_planned": model.run.max_num_training_steps,
        }
        settings["training"] = training
    if model.folder is not None:
        folder = model.folder / EVALUATIONS
    else:
        folder = RUNS / EVALUATIONS / network_name(model.path, model.network, name)
    evaluated = _evaluate(
        model.network,
        test,
        protocols,
        folder,
        batch_size,
        settings,
        store=lambda plan, images: _store(plan, images, dataset, challenge),
        prefix="" if model.run is None or name == model.run.dataset else f"{name}-",
    )
    if evaluated is None:
        return
    output_dir, result = evaluated
    print_result(result, published_beside(model.release, dataset))
    print(f"ledger: {output_dir / 'ledger.csv'}")
    is_strong = any(protocol.startswith(("autoattack", "adaptive")) for protocol in protocols)
    if model.is_squeezed and not is_strong and result["robust_accuracy"]:
        print("PGD flatters this family, run --protocol=autoattack")
    _print_next(is_strong, output_dir, count, {"model_dir": model.path}, model.folder)


def _evaluate_own() -> None:
    from logit_reg.attacks.engine.active_set import count_classes
    from logit_reg.experiments.evaluations import EVALUATIONS, TestImages, print_result
    from logit_reg.experiments.own_models import load_own_model
    from logit_reg.experiments.sources import RUNS

    own = load_own_model()
    test = TestImages(own.path.stem, own.images, own.labels, (own.threat.lower, own.threat.upper))
    num_classes = count_classes(own.network, own.images)
    protocols = _own_protocols(own.threat, num_classes)
    settings = {"model": FLAGS.model, "data": FLAGS.data}
    folder = RUNS / EVALUATIONS / own.name
    batch_size = FLAGS.eval_batch_size or 200
    evaluated = _evaluate(own.network, test, protocols, folder, batch_size, settings, _store)
    if evaluated is None:
        return
    output_dir, result = evaluated
    print_result(result)
    print(f"ledger: {output_dir / 'ledger.csv'}")
    is_strong = any(protocol.startswith(("autoattack", "adaptive")) for protocol in protocols)
    _print_next(is_strong, output_dir, len(own.images), {"model": FLAGS.model})


def _evaluate(network, test, protocols, folder, batch_size, settings, store, prefix=""):
    """The folder and content of `result.json`, or None in a worker, which leaves batches only."""
    from logit_reg.attacks.engine.low_precision import followed_dtype
    from logit_reg.evaluation.ledger import evaluation_identity, evaluation_name
    from logit_reg.evaluation.units import attack_notices
    from logit_reg.experiments.evaluations import (
        claim_file,
        claim_output_dir,
        compute_batches,
        evaluate_protocols,
        open_state,
        plan_evaluation,
        print_estimate,
        read_attack_dtype,
    )
    from logit_reg.experiments.workers import run_workers

    num_attacks = len({name for attacks in protocols.values() for name in attacks})
    flag_effects.refuse_without_effect(flag_effects.EVALUATION, num_attacks=num_attacks)
    lower = read_attack_dtype(FLAGS.attack_dtype, network, test.images, batch_size)
    what = {
        "seed": FLAGS.random_seed,
        "worst_case_only": FLAGS.worst_case_only,
        "gradient_logits_fn": lower,
    }
    attacks = [attack for named in protocols.values() for attack in named.values()]
    command_line.tell(attack_notices(attacks, test.images.shape[1:]))
    options = {"batch_size": batch_size, "show_progress": FLAGS.progress, **what}
    plan = plan_evaluation(network, test, protocols, **what)
    name = prefix + evaluation_name(plan | {"settings": settings | plan["settings"]})
    output_dir = Path(FLAGS.output_dir or folder / name)
    if FLAGS.worker:
        compute_batches(network, test, protocols, open_state(output_dir, network), **options)
        return None
    claim_output_dir(output_dir, plan)
    if FLAGS.store_adv_path:
        claim_file(Path(FLAGS.store_adv_path), evaluation_identity(plan), "--store_adv_path")
    print_estimate(network, test, protocols, batch_size=batch_size)
    if FLAGS.num_workers > 1:
        run_workers(output_dir, followed_dtype(lower))
    _, result = evaluate_protocols(
        network,
        test,
        protocols,
        output_dir,
        settings=settings,
        store=functools.partial(store, plan),
        **options,
    )
    return output_dir, result


def _store(plan, images, dataset=None, challenge=None) -> None:
    """Write the worst-case images where --store_adv_path says, if it does."""
    from logit_reg.evaluation.ledger import evaluation_identity
    from logit_reg.experiments.evaluations import note_file
    from logit_reg.experiments.submissions import write_adversarial
    from logit_reg.files import write_array

    if not FLAGS.store_adv_path:
        return
    path = Path(FLAGS.store_adv_path)
    if challenge is not None:
        write_adversarial(path, images, dataset, challenge)
    else:
        write_array(path, images)
        print(f"adversarial images: {path}")
    note_file(path, evaluation_identity(plan))


def _print_next(is_strong, output_dir, count, model, run_folder=None) -> None:
    """AutoAttack on the same model and data, or, after that, the table."""
    from logit_reg.experiments.sources import RUNS

    if is_strong:
        above = [folder.resolve() for folder in output_dir.parents]
        shown = output_dir
        if run_folder is not None and run_folder.resolve() in above:
            shown = run_folder
        is_in_runs = RUNS.resolve() in above
        command_line.print_next("report", {} if is_in_runs else {"runs": shown})
        return
    names = ["data", "bounds", "dataset", "data_dir", "data_path"]
    if FLAGS.model:
        names += ["norm", "epsilon"]
    flags = model | {name: FLAGS[name].value for name in names if FLAGS[name].value is not None}
    flags |= {"protocol": "autoattack", "num_eval_examples": min(count, _MOST_AUTOATTACKED)}
    command_line.print_next("eval_challenge", flags)


def challenge_protocols(challenge):
    """Attacks by protocol and name, from --protocol, the attack flags or the challenge."""
    from logit_reg.commands.attack_flags import attack_from_flags, challenge_threat
    from logit_reg.evaluation.ledger import FLAGS_PROTOCOL, threat_suffix
    from logit_reg.evaluation.protocols import any_threat_attacks, protocol_attacks

    names = [name.strip() for name in FLAGS.protocol or ()]
    given = flag_groups.given_attack_flags()
    if names and not given:
        return {name: protocol_attacks(name, challenge) for name in names}
    if names:
        _refuse_frozen(names, f"leave out --{given[0]}")
        threat = challenge_threat(challenge)
        suffix = threat_suffix(dataclasses.asdict(threat))
        # Another threat model is another attack: it never shares a column with the protocol's.
        return {
            name: {
                f"{key}{suffix}": attack for key, attack in any_threat_attacks(name, threat).items()
            }
            for name in names
        }
    if not given:
        name = challenge.protocol
        print(f"protocol: {name}, the challenge's own (choose with --protocol)")
        return {name: protocol_attacks(name, challenge)}
    return {FLAGS_PROTOCOL: attack_from_flags(challenge_threat(challenge), challenge)}


def _own_protocols(threat, num_classes):
    """Attacks by protocol and name on a threat model of the user's own."""
    from logit_reg.commands.attack_flags import attack_from_flags
    from logit_reg.evaluation.ledger import FLAGS_PROTOCOL
    from logit_reg.evaluation.protocols import any_threat_attacks

    if not FLAGS.protocol:
        return {FLAGS_PROTOCOL: attack_from_flags(threat, None)}
    names = [name.strip() for name in FLAGS.protocol]
    _refuse_frozen(names)
    return {name: any_threat_attacks(name, threat, num_classes) for name in names}


def _refuse_frozen(names, *instead) -> None:
    """The cascades alone take another threat model, or other images."""
    from logit_reg.evaluation.protocols import ANY_THREAT, PROTOCOLS

    frozen = [name for name in names if name in PROTOCOLS.keys() - ANY_THREAT.keys()]
    if frozen:
        ways = [
            *instead,
            f"choose from {', '.join(ANY_THREAT)}",
            "describe the attack with --num_steps, --step_size, --loss_func and --restarts",
        ]
        raise UsageError(
            f"--protocol={frozen[0]}: a protocol is frozen to its challenge's images and threat "
            f"model; {', '.join(ways[:-1])} or {ways[-1]}."
        )


def _is_contaminated(model, name) -> bool:
    """Whether the images are some that the run was trained on."""
    from madry_compat.challenges import image_set

    taken_from = image_set(name).taken_from
    contaminated = model.run is not None and model.run.dataset == taken_from
    if contaminated:
        command_line.notice(
            f"warning: this run was trained on {taken_from} and {name} consists of {taken_from}'s "
            "training images: the numbers are of no value and never enter a table."
        )
    return contaminated


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__, check_flags=check_flags)


if __name__ == "__main__":
    run()
