"""A healing touches nothing of the user's: where it may write, and which words it takes."""

import json
import os
import shutil

from arena import Row
from damage import linked, pipe, written
from heal_rows import WITH_FILE, heal, parametrised, rows, trainer

from isingcut.files.writing import write_json


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


READ = "which this command reads; nothing was written"
NOT_OURS = "where healing keeps its unfinished work, is there and no healing"
WORK = ".healed.healing"
# Where the output would be, with `--overwrite`.
OUTPUTS = [
    ("teacher", "{model}", f"output .*/model is .*{READ}"),
    ("student", "{run}/model", f"output .*run/model is .*{READ}"),
    ("text", "{text}", f"output .*text.txt is .*{READ}"),
    ("all of it", "{here}", f"contains .*{READ}"),
    ("inside the student", "{run}/model/healed", f"lies in .*run/model, {READ}"),
    ("inside the teacher", "{model}/healed", f"lies in .*/model, {READ}"),
    ("home", "{home}", "stays as it is: it holds diary.txt"),
    ("a link to the teacher", "{here}/link", f"output .*link is .*{READ}", linked("link", "model")),
    ("a link into the student", "{here}/link/new", f"lies in .*run/model, {READ}",
     linked("link", "run/model")),
    ("a hard link to the text", "{here}/healed", f"output .*healed is .*text.txt, {READ}",
     lambda arena: os.link(arena.text, arena.here / "healed")),
    ("ours with a file of the user's", "{here}/healed", "isingcut did not write notes.txt in it",
     changed_since),
    ("below a file", "{text}/healed", "lies in .*text.txt"),
    ("below another file", "{home}/diary.txt/healed", "cannot write"),
    ("a name too long", "{here}/" + 250 * "x", "cannot write"),
]  # fmt: skip
# What stands where a healing keeps its work.
KEPT = [
    ("a folder", NOT_OURS, written(f"{WORK}/notes.txt")),
    ("a file", NOT_OURS, written(WORK)),
    ("a link", NOT_OURS, linked(WORK, "home")),
    ("work of another version", NOT_OURS, written(f"{WORK}/identity.json", '"0123456789abcdef"')),
    ("another's", "holds an unfinished healing with other options; type that command again",
     unfinished),
]  # fmt: skip
PLACES = rows((n, heal("--overwrite", out=out), *rest) for n, out, *rest in OUTPUTS)
PLACES += rows((f"{name} in the work folder's place", heal(), *rest) for name, *rest in KEPT)
PLACES += rows([
    ("there", heal(out="{home}"), "already exists and nothing was written"),
    ("a link to nothing", heal(), "healed already exists", linked("healed", "gone")),
    ("the trainer file", heal("--overwrite --trainer {here}/t.yaml", out="{here}/t.yaml"),
     f"output .*t.yaml is .*{READ}", trainer("weight_decay: 0.1\n")),
    ("the config file", heal("--overwrite --config {here}/c.yaml", out="{here}/c.yaml"),
     f"output .*c.yaml is .*{READ}", written("c.yaml", "seed: 1\n")),
    ("the folder of the trainer file",
     heal("--overwrite --trainer {here}/mine/t.yaml", out="{here}/mine"),
     f"output .*mine contains .*{READ}", written("mine/t.yaml", "weight_decay: 0.1\n")),
    ("the teacher in the work folder's place", heal(teacher="{here}/.healed.healing"),
     f"output .*healed.healing is .*{READ}",
     lambda a: shutil.copytree(a.model, a.here / WORK)),
])  # fmt: skip


# words and files --------------------------------------------------------------------------


def block_0_missing(arena):
    """A cut that lacks its first blocks only."""
    from isingcut.models.cutting.checkpoint import excise

    more = {"isingcut.json": json.dumps({"removed": [0, 1], "of": 6})}
    excise(arena.model, [0, 1], arena.here / "headless", extra_files=more)


WORDS = rows([
    ("a patch before nothing", heal("--patch linear --method none", student="{here}/headless"),
     "block 0 is removed, so that nothing stands before", block_0_missing),
    ("rank", heal("--method lora:33"), "--method lora:33 is more than"),
    ("unknown schedule", heal(lr_scheduler_type="cosin"),
     "the schedule .*cosin is not a valid SchedulerType"),
    ("a schedule that waits", heal(lr_scheduler_type="reduce_lr_on_plateau"),
     "lr_scheduler_type reduce_lr_on_plateau falls when"),
    ("a schedule without its settings", heal(lr_scheduler_type="cosine_with_min_lr"),
     "transformers refuses .*lr_scheduler_kwargs"),
    ("no steps", heal(max_steps=0), "max_steps must be above 0"),
    ("batch", heal(per_device_train_batch_size=0), "batch_size must be above 0"),
    ("steps and a time", heal("--effort 10min"), "--effort and max_steps in .* both say"),
    ("last blocks", heal("--method last:99"), "--method last:99: the cut model has"),
    ("nothing to do", heal("--method none --patch none"), "leaves nothing to do"),
    ("many samples", heal("--samples 1000000"), "too short"),
    ("no file", WITH_FILE, "t.yaml"),
    ("a pipe", WITH_FILE, "t.yaml", pipe("t.yaml")),
    ("a list", WITH_FILE, "t.yaml must hold", trainer("- 1\n")),
    ("a typing error", WITH_FILE, "did you mean 'adam_beta2'", trainer("adam_beta3: 0.9\n")),
])  # fmt: skip
# What a trainer file may not set, and what it may not set so.
OTHERS = """
output_dir: /tmp/elsewhere
push_to_hub: true
report_to: [wandb]
logging_dir: /tmp/elsewhere
resume_from_checkpoint: /tmp/elsewhere
save_strategy: 'no'
eval_strategy: steps
remove_unused_columns: true
use_cpu: false
"""
WRONG = """
adam_beta2: high
adam_beta1: 1.5
learning_rate: .nan
learning_rate: -1
num_train_epochs: 0
weight_decay: .nan
max_grad_norm: .inf
optim: 3
optim: [adamw_torch]
optim: nonsense
bf16: 'yes'
dataloader_num_workers: true
lr_scheduler_kwargs: 3
lr_scheduler_kwargs: {nonsense: 1}
"""
for said, table in (("--trainer cannot set '{}'", OTHERS), ("{}", WRONG)):
    for typed in table.strip().splitlines():
        name = typed.partition(":")[0].removesuffix("beta1")
        WORDS.append(Row(f"trainer: {typed}", WITH_FILE, said.format(name), trainer(typed)))


@parametrised(PLACES + WORDS)
def test_a_place_or_a_word_is_refused(arena, row):
    arena.try_row(row)
