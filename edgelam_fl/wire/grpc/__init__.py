"""Links over gRPC: `dial` and `serve` are the two ends, `link` and `options` what both share."""
