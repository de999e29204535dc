"""Load models and tokenizers, identify them by a fingerprint, and place them on devices."""
