"""The Flower ServerApp: rounds of split federated training."""
