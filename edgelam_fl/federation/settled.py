"""Is imported last by the template: what it has imported stays, so collections of garbage in its forks pass it over.

A collection writes into every object that it looks at, and so gives each fork a copy of what all could share.
"""

import gc

gc.collect()
gc.freeze()
