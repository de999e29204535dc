"""persea: any teacher families into any student, and it proves it.

Read downward: the order in which a prompt flows. A module imports only from modules above it (lazily, `run` and `cli`
from everywhere); tests/test_map.py holds this map true.

    errors        what can go wrong, in one line, with its exit code
    # who speaks
    vocabulary    one tokenizer as bytes, proven by round trip
    template      the model's own Jinja chat template, sandboxed, its date pinned
    chat          Conversation, Tokens (one tokenizer's view of it), Family (what a family says of itself)
    voice         Voice: a Family on one tokenizer and template; renders, places bytes, parses
    families      llama qwen gemma gpt_oss: conversation <-> tokens <-> bytes, thinking dial, stops, licence; generic: any other model
    models        where weights come from: folder, hub, or a random sprout of a family's architecture
    # what a person asks for
    schedule      how the learning rate goes, step by step
    places        a page of YAML as plain data, and where each key of it stands
    sections      the sections of a recipe: keys, bounds, meanings, contradictions
    recipe        Recipe: the one YAML file a person writes -> frozen sections, checked, hashed
    # what to ask, and whom
    corpus        Prompt: what to ask; duplicates and test items removed, with a record
    measure       Skill, Score: one number with n and interval
    skills        languages code reasoning: held-out questions and a grader each
    engines       local: where weights run; token ids only
    teacher       Teacher: a voice on an engine; answers in words, scores in log-probabilities
    audition      Cast: every teacher measured on every skill; who teaches what
    # what they said
    rows          Rows: one position's teacher distribution each, sparse; and of what kind
    tables        how often each value of a column stands in a unit, and the entropy coder under it
    codec         tokens and rows <-> entropy-coded streams
    store         where bytes lie: publish, digest, create-if-absent, one run per folder
    cache         captures on disk: packed, digested, memory-mapped units
    reader        captures by number, in an order that seed and epoch decide; several caches mixed by share
    shelf         a folder of units as a whole: info, verify, merge, export
    capture       ask the cast, keep what it said; resumes where it stopped
    # making it the student's
    align         Spans: two tokenizers laid over the same bytes
    merges        Merges: how one tokenizer builds its tokens, and which can never stand side by side
    pretokens     where a tokenizer cuts text into words before it merges
    masks         Mask: what cannot stand next where the other tokenizer has a boundary
    bridge        Bridge: two vocabularies laid over the same events
    completion    what a row says in the middle of a teacher token
    check         is this pairing sound? refuses below a floor
    losses        targets events token full chunk: pure functions (logits, targets) -> LossOut
    ranks         World: the processes that train together; how they were launched, or that it is refused
    watch         one process among others: joined, watched, ended together; who is gone is named
    launch        several processes on this machine: started, signalled, none left behind
    student       Student: load, adapt (full or LoRA), run, spread over processes, save
    feed          captures -> lessons -> batches, the same whoever asks
    checkpoints   what a training is made of at a step, on disk
    train         the one loop: batch, loss, step, checkpoint
    boards        tensorboard, trackio, wandb: where metrics are shown too
    # is it true
    evaluate      the student beside every teacher and its base, on every skill
    lineage       what made these weights
    charts        pictures of numbers, as SVG
    findings      what a run's files say, read and checked: rows, standings, computed sentences
    report        the page, the card, report.json
    # the river
    river         what a recipe's words stand for, and the run folder
    teach         the stage train: lessons, student and objective handed to the loop, in one process or several
    status        what a run did, does, and died of: written as it goes, read from files alone
    run           every stage in order, each skipped when its output stands: read it first
    plan          what a run would do and cost
    progress      what a person sees while it runs
    cli           one verb a stage, and the small ones
"""

__version__ = "0.1.0"
