"""The Flower ClientApp: hands plans to a node's stage host."""
