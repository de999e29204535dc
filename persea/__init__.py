"""persea: any teacher families into any student, and it proves it.

Read downward: the order in which a prompt flows. A module imports only from modules above it (lazily, `run` and `cli`
from everywhere); tests/test_layers.py holds this map true.

    errors        what can go wrong, in one line, with its exit code
    # who speaks
    vocabulary    one tokenizer as bytes, proven by round trip
    template      the model's own Jinja chat template, sandboxed, its date pinned
    chat          Conversation, Tokens (one tokenizer's view of it), Family (what a family says of itself)
    voice         Voice: a Family on one tokenizer and template; renders, places bytes, parses
    families      llama qwen gemma gpt_oss: conversation <-> tokens <-> bytes, thinking dial, stops, licence; generic: any other model;
                  hybrid: a thinking switch before any template
    placement     fewer bits a weight, and main memory beside a GPU's; or why not
    models        where weights come from: folder, hub, or a random sprout of a family's architecture
    # what a person asks for
    schedule      how the learning rate goes, step by step
    balance       what a position counts for, so that no teacher and no skill drowns the others
    places        a page of YAML as plain data, and where each key of it stands
    sections      the sections of a recipe: keys, bounds, meanings, contradictions
    recipe        Recipe: the one YAML file a person writes -> frozen sections, checked, hashed
    # what to ask, and whom
    store         where bytes lie: publish, digest, create-if-absent, one run per folder
    tongues       which language a text is in
    hygiene       what a text shares with another: runs of words that are tested, near-duplicates
    corpus        Prompt: what to ask; duplicates and test items removed, kept aside with the reason
    intervals     what n values allow to say: of a mean, of two speakers on the same items, at any time
    measure       Skill, Score: one number with n and interval; Paired: two speakers on the same items
    jail          what runs inside the sandbox first: it builds the walls, then keeps watch
    exam          what runs inside two of them: tests on one side, the tested program on the other
    sandbox       where strangers' code runs, or is refused
    trial         a program against its tests, each in a sandbox of its own
    skills        languages code safety reasoning tools: held-out questions and a grader each
    sets          published questions for real models, read in place: languages reasoning code safety tools instructions
    rows          Rows: one position's teacher distribution each, sparse; and of what kind
    engines       local vllm endpoint talk: where weights run, here or behind a server; what each can give
    teacher       Teacher: a voice on an engine; answers in words, scores in log-probabilities
    asking        one speaker on one skill's questions: asked once, kept, graded anew
    contest       every teacher on every skill, in rounds, until the ranking is settled
    audition      Cast: every teacher measured on every skill; who teaches what
    # what they said
    tables        how often each value of a column stands in a unit, and the entropy coder under it
    codec         tokens and rows <-> entropy-coded streams
    cache         captures on disk: packed, digested, memory-mapped units
    reader        captures by number, in an order that seed and epoch decide; several caches mixed by share
    shelf         a folder of units as a whole: info, verify, merge, export
    capture       ask the cast, keep what it said; resumes where it stopped
    sift          a teacher's answers before they teach: wrong ones are kept aside
    # making it the student's
    align         Spans: two tokenizers laid over the same bytes
    merges        Merges: how one tokenizer builds its tokens, and which can never stand side by side
    pretokens     where a tokenizer cuts text into words before it merges
    masks         Mask: what cannot stand next where the other tokenizer has a boundary
    bridge        Bridge: two vocabularies laid over the same events
    completion    what a row says in the middle of a teacher token
    check         is this pairing sound? refuses below a floor
    questions     what a recipe asks with: skills by generators or published sets, prompts, reference answers
    losses        targets events token groups full chunk: pure functions (logits, targets) -> LossOut; head: the same from hidden states,
                  over products: by the quicker of two libraries; fused: on a GPU
    hidden        what a causal model gives to its head, and makes of the head's output
    extension     a tokenizer's merges gone on with: what it spells by bytes becomes tokens, and no known id moves
    longer        a model given a row for each of them, saved for a recipe to name
    ranks         World: the processes that train together; how they were launched, or that it is refused
    watch         one process among others: joined, watched, ended together; who is gone is named
    launch        several processes on this machine: started, signalled, none left behind
    student       Student: load, adapt (full or LoRA), run, spread over processes, save
    feed          captures -> lessons -> batches, the same whoever asks
    likely        of many distributions the tokens worth asking about
    marks         runs of tokens without bytes in two renderings of one answer
    beside        what a teacher says of a student's own tokens: whole rows, or chunks
    advice        the same as a loss
    rollouts      what the student says itself, beside its teachers' distributions
    checkpoints   what a training is made of at a step, on disk
    train         the one loop: batch, loss, step, checkpoint
    boards        tensorboard, trackio, wandb: where metrics are shown too
    # is it true
    evaluate      the student beside every teacher and its base, on every skill
    modes         the hybrid student in each mode: score, leaks, length and language of its thoughts
    lineage       what made these weights
    charts        pictures of numbers, as SVG
    hybrid_page   what is told of a hybrid student: rows, sentences, the page's section
    findings      what a run's files say, read and checked: rows, standings
    sentences     what the numbers and their intervals allow to say
    lm_eval       standard tasks as lm-eval measured them: its results file, read
    report        the page, the card, report.json
    compare       two runs beside each other, on the same items, and what differs in their recipes
    # a model at work
    serve         a model behind OpenAI's routes, with real log-probabilities
    talk          a conversation with one model: switches, history, words as they come
    # the river
    far           teachers whose weights are not opened here: behind a server, or in vLLM
    river         what a recipe's words stand for, and the run folder
    teach         the stage train: lessons, student and objective handed to the loop, in one process or several
    status        what a run did, does, and died of: written as it goes, read from files alone
    inputs        what the output of each stage depends on
    beforehand    what cannot be in the end, told in the beginning
    run           every stage in order, each skipped when its output stands: read it first
    plan          what a run would do and cost
    progress      what a person sees while it runs
    cli           one verb a stage, and the small ones
"""

__version__ = "0.1.0"
