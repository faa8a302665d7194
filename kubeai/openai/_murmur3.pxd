"""MurmurHash3_x64_128 with seed 0, of which only the first 64 bits are computed to the end.

The hash key of a request is defined by it (see ``InferenceRequest.key``). The package mmh3 computes
the same, but is only callable from Python: two calls and their objects took a tenth of a chat
request's instructions. The tests compare them.
"""

from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #include <stddef.h>
    #include <stdint.h>
    #include <string.h>

    #define KB_C1 0x87c37b91114253d5u
    #define KB_C2 0x4cf5ad432745937fu

    static inline uint64_t kb_rotl(uint64_t x, int bits) {
        return x << bits | x >> (64 - bits);
    }
    static inline uint64_t kb_final_mix(uint64_t x) {
        x = (x ^ x >> 33) * 0xff51afd7ed558ccdu;
        x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53u;
        return x ^ x >> 33;
    }
    static inline uint64_t kb_mix_first(uint64_t word) {
        return kb_rotl(word * KB_C1, 31) * KB_C2;
    }
    static inline uint64_t kb_mix_second(uint64_t word) {
        return kb_rotl(word * KB_C2, 33) * KB_C1;
    }

    static uint64_t kb_murmur3(const char *at, size_t size) {
        uint64_t one = 0, two = 0, words[2];
        size_t left = size;
        for (; left >= 16; left -= 16, at += 16) {
            memcpy(words, at, 16);  /* little-endian, as everywhere in the core */
            one ^= kb_mix_first(words[0]);
            one = (kb_rotl(one, 27) + two) * 5 + 0x52dce729;
            two ^= kb_mix_second(words[1]);
            two = (kb_rotl(two, 31) + one) * 5 + 0x38495ab5;
        }
        memset(words, 0, 16);
        memcpy(words, at, left);
        one ^= kb_mix_first(words[0]);  /* 0 for words[] = 0, so an empty tail changes nothing */
        two ^= kb_mix_second(words[1]);
        one ^= size;
        two ^= size;
        one += two;
        two += one;
        return kb_final_mix(one) + kb_final_mix(two);
    }
    """
    uint64_t murmur3 "kb_murmur3"(const char *at, size_t size) nogil
