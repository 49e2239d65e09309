/* What every hand-over runs lies side by side in memory: a rank that has computed for a while finds none of it in the caches,
   and each page of code costs it a walk through the page tables. */

#ifndef DEISA_HANDOFF_HOT_H
#define DEISA_HANDOFF_HOT_H

#define HOT __attribute__((hot))

#endif
