"""A healing touches nothing of the user's: where it may write, and which words it takes."""

import json
import os
import shutil

from arena import Row
from heal_rows import WITH_FILE, heal, linked, parametrised, rows, trainer, written

from isingcut.files.writing import write_json


def hard_link(arena):
    os.link(arena.text, arena.here / "healed")


def unfinished(arena):
    """Work of another healing, its patch done."""
    work = arena.here / ".healed.healing"
    work.mkdir()
    write_json(work / "identity.json", "healing-work", {"work": "a"})
    unpatched = {"cuts": [], "changed": False, "unpatched": []}
    write_json(work / "patched.json", "healing-patched", unpatched)


def changed_since(arena):
    """An output of ours to which the user added a file."""
    shutil.copytree(arena.run / "model", arena.here / "healed")
    (arena.here / "healed" / "notes.txt").write_text("mine", encoding="utf-8")


READ = "an input of this command; nothing was written"
NOT_OURS = "the folder for unfinished work, exists and is not from"
PLACES = rows(
    [
        ("teacher", heal("--overwrite", out="{model}"), f"output .*/model is .*{READ}"),
        ("student", heal("--overwrite", out="{run}/model"), f"output .*run/model is .*{READ}"),
        ("text", heal("--overwrite", out="{text}"), f"output .*text.txt is .*{READ}"),
        ("all of it", heal("--overwrite", out="{here}"), f"contains .*{READ}"),
        ("inside the student", heal(out="{run}/model/healed"), f"lies in .*run/model, {READ[:5]}"),
        ("inside the teacher", heal(out="{model}/healed"), f"lies in .*/model, {READ[:5]}"),
        ("home", heal("--overwrite", out="{home}"), "is not replaced: it has diary.txt"),
        ("there", heal(out="{home}"), "already exists, nothing was written"),
        (
            "a link to the teacher",
            heal("--overwrite", out="{here}/link"),
            f"output .*link is .*{READ}",
            linked("link", "model"),
        ),
        (
            "a link into the student",
            heal("--overwrite", out="{here}/link/new"),
            f"lies in .*run/model, {READ[:5]}",
            linked("link", "run/model"),
        ),
        (
            "a hard link to the text",
            heal("--overwrite"),
            f"output .*healed is .*text.txt, {READ[:5]}",
            hard_link,
        ),
        (
            "a link to nothing",
            heal(),
            "healed already exists",
            linked("healed", "gone"),
        ),
        (
            "the trainer file",
            heal("--overwrite --trainer {here}/t.yaml", out="{here}/t.yaml"),
            f"output .*t.yaml is .*{READ}",
            written("t.yaml", "weight_decay: 0.1\n"),
        ),
        (
            "the config file",
            heal("--overwrite --config {here}/c.yaml", out="{here}/c.yaml"),
            f"output .*c.yaml is .*{READ}",
            written("c.yaml", "seed: 1\n"),
        ),
        (
            "the folder of the trainer file",
            heal("--overwrite --trainer {here}/mine/t.yaml", out="{here}/mine"),
            f"output .*mine contains .*{READ}",
            written("mine/t.yaml", "weight_decay: 0.1\n"),
        ),
        (
            "ours with a file of the user's",
            heal("--overwrite"),
            "isingcut did not write notes.txt in it",
            changed_since,
        ),
        ("below a file", heal(out="{text}/healed"), "lies in .*text.txt"),
        ("below another file", heal(out="{home}/diary.txt/healed"), "cannot write"),
        ("a name too long", heal(out="{here}/" + 250 * "x"), "cannot write"),
        (
            "a folder in the work folder's place",
            heal(),
            NOT_OURS,
            written(".healed.healing/notes.txt"),
        ),
        ("a file in the work folder's place", heal(), NOT_OURS, written(".healed.healing")),
        (
            "a link in the work folder's place",
            heal(),
            NOT_OURS,
            linked(".healed.healing", "home"),
        ),
        (
            "a work folder of another version",
            heal(),
            NOT_OURS,
            written(".healed.healing/identity.json", '"0123456789abcdef"'),
        ),
        (
            "the teacher in the work folder's place",
            heal(teacher="{here}/.healed.healing"),
            f"output .*healed.healing is .*{READ}",
            lambda a: shutil.copytree(a.model, a.here / ".healed.healing"),
        ),
        (
            "another healing's work",
            heal(),
            "has an unfinished healing with other options; run that command again",
            unfinished,
        ),
    ]
)


# words and files --------------------------------------------------------------------------


def block_0_missing(arena):
    """A cut that lacks its first blocks only."""
    from isingcut.models.cutting.checkpoint import excise

    more = {"isingcut.json": json.dumps({"removed": [0, 1], "of": 6})}
    excise(arena.model, [0, 1], arena.here / "headless", extra_files=more)


WORDS = rows(
    [
        (
            "a patch before nothing",
            heal("--patch linear --method none", student="{here}/headless"),
            "block 0 is removed, so no block before",
            block_0_missing,
        ),
        ("rank", heal("--method lora:33"), "--method lora:33 is more than"),
        (
            "unknown schedule",
            heal(lr_scheduler_type="cosin"),
            "the schedule .*cosin is not a valid SchedulerType",
        ),
        (
            "a schedule that waits",
            heal(lr_scheduler_type="reduce_lr_on_plateau"),
            "lr_scheduler_type reduce_lr_on_plateau needs evaluations",
        ),
        (
            "a schedule without its settings",
            heal(lr_scheduler_type="cosine_with_min_lr"),
            "transformers rejects .*lr_scheduler_kwargs",
        ),
        ("no steps", heal(max_steps=0), "max_steps must be above 0"),
        ("batch", heal(per_device_train_batch_size=0), "batch_size must be above 0"),
        ("steps and a time", heal("--effort 10min"), "--effort and max_steps in .* both set"),
        ("seed", heal("--seed -1"), "seed"),
        ("device", heal("--device tpu"), "--device: must be auto, cpu"),
        ("method", heal("--method qlora"), "--method must be one of"),
        ("last blocks", heal("--method last:99"), "--method last:99: the cut model has"),
        ("nothing to do", heal("--method none --patch none"), "leave nothing to do"),
        ("many samples", heal("--samples 1000000"), "too short"),
        ("no file", WITH_FILE, "t.yaml"),
        ("a pipe", WITH_FILE, "t.yaml", lambda a: os.mkfifo(a.here / "t.yaml")),
        ("a device", heal("--trainer /dev/zero"), "/dev/zero"),
        ("a list", WITH_FILE, "t.yaml must have", trainer("- 1\n")),
        ("a typing error", WITH_FILE, "did you mean 'adam_beta2'", trainer("adam_beta3: 0.9\n")),
    ]
)
WORDS += [
    Row(f"trainer sets {key}", WITH_FILE, f"--trainer cannot set '{key}'", trainer(line))
    for key, line in (
        (line.partition(":")[0], line)
        for line in (
            "output_dir: /tmp/elsewhere",
            "push_to_hub: true",
            "report_to: [wandb]",
            "logging_dir: /tmp/elsewhere",
            "resume_from_checkpoint: /tmp/elsewhere",
            "save_strategy: 'no'",
            "eval_strategy: steps",
            "remove_unused_columns: true",
            "use_cpu: false",
        )
    )
]
WORDS += [
    Row(f"trainer: {line}", WITH_FILE, line.partition(":")[0].removesuffix("beta1"), trainer(line))
    for line in (
        "adam_beta2: high",
        "adam_beta1: 1.5",
        "learning_rate: .nan",
        "learning_rate: -1",
        "num_train_epochs: 0",
        "weight_decay: .nan",
        "max_grad_norm: .inf",
        "optim: 3",
        "optim: [adamw_torch]",
        "optim: nonsense",
        "bf16: 'yes'",
        "dataloader_num_workers: true",
        "lr_scheduler_kwargs: 3",
        "lr_scheduler_kwargs: {nonsense: 1}",
    )
]


@parametrised(PLACES + WORDS)
def test_a_place_or_a_word_is_refused(arena, row):
    arena.try_row(row)
