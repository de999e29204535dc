"""What persea costs at real size, beside an earlier build and beside bare PyTorch."""
