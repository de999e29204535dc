"""The recipe: one YAML file, parsed, validated and hashed."""
