"""Compare distillation objectives with small teachers and students on real text.

    python -m bench.objectives teachers --size xs

then `vocabularies`, `students`, `report`; `make bench-objectives` does all. Modules, in the order
of use:

    data          PERSEA_DATA -> documents by domain, split by page, windows of at most 256 bytes
    vocabularies  the real tokenizers, cut to the tokens that this text uses (closed under merging)
    extension     the student's vocabulary with extra tokens for scripts that it spells by bytes
    models        sizes, small Llama models, training of teachers, their cached hidden states
    examples      windows in student and teacher tokens, with the teacher's distributions
    words         text sampled from the teachers
    methods       (logits, examples) -> loss, one function per method, all composed alike
    gold          TRL's own GOLD as one more method
    chunks        persea's span likelihood term beside its events
    arms          the experiment: which runs, with which settings; a JSON line each, resumable
    gradients     does the span likelihood term pull in the direction of the event term?
    report        docs/results.md and its charts from the JSON lines
"""
