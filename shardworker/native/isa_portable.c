/* Any processor: vectors of four. */
#define LANES 4
#include "attention.h"
#include "products.h"

const struct operations portable_operations = {"portable", linear, feed_forward, attention};
