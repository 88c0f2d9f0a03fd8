"""Who belongs to a federation: keys, certificates, invites, members. Knows no run, no link and no Flower."""
