"""Links over gRPC: `dial` and `serve` are the two ends; `link`, `options` and `secure` are what both share."""
