"""Which objective? Small teachers and students on real text, every method under the same conditions.

    python -m bench.objectives teachers --size xs      (then: vocabularies, students, report; `make bench-objectives` does all)

Downward, in the order of use:

    data          PERSEA_DATA -> documents by domain, split by page over all languages -> windows of at most 256 bytes
    vocabularies  the real tokenizers, cut to the tokens that this text uses (closed under merging), as persea voices
    extension     the student's vocabulary extended by tokens of scripts that it breaks into bytes
    models        sizes, small Llama models, training of teachers, their cached states
    lessons       windows in the student's tokens beside the teacher's, and what the teacher says at common boundaries
    words         text in the teachers' own words
    methods       (logits, lessons) -> loss, one function a method, all composed alike
    gold          TRL's own GOLD as one more method
    chunks        persea's chunk term beside its events
    arms          the experiment: which runs there are, at what settings; one JSON line each, resumable
    gradients     does the chunk term pull where events pull?
    report        docs/results.md and its charts from the JSON lines
"""
