"""Load models and tokenizers; identify them by digest; place them on devices."""
