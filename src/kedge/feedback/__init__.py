"""What people say of responses: a store of judgments and the site at which they are given. Needs no PyTorch."""
