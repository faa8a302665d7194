"""Fingerprints of secret texts: SipHash-2-4 with a result of 128 bits, inlined by its users.

There is no ``_fingerprint.pyx``. A fingerprint takes a tenth of the instructions of a SHA-256. With
a secret that nobody else knows, it is a pseudorandom function: a client can neither compute the
fingerprint of a text nor choose it, and meets that of another text with a probability of 2⁻¹²⁸.

Source: Aumasson and Bernstein, "SipHash: a fast short-input PRF", and the authors' variant with 128
bits.
"""

from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    typedef struct { uint64_t low, high; } kb_fingerprint;
    #define KB_ROTATED(x, by) ((x) << (by) | (x) >> (64 - (by)))
    #define KB_ROUND(v) do { \\
        v[0] += v[1]; v[1] = KB_ROTATED(v[1], 13) ^ v[0]; v[0] = KB_ROTATED(v[0], 32); \\
        v[2] += v[3]; v[3] = KB_ROTATED(v[3], 16) ^ v[2]; \\
        v[0] += v[3]; v[3] = KB_ROTATED(v[3], 21) ^ v[0]; \\
        v[2] += v[1]; v[1] = KB_ROTATED(v[1], 17) ^ v[2]; v[2] = KB_ROTATED(v[2], 32); \\
    } while (0)
    static inline void kb_add_word(uint64_t v[4], uint64_t word) {
        v[3] ^= word;
        KB_ROUND(v); KB_ROUND(v);
        v[0] ^= word;
    }
    static inline uint64_t kb_finished(uint64_t v[4]) {
        KB_ROUND(v); KB_ROUND(v); KB_ROUND(v); KB_ROUND(v);
        return v[0] ^ v[1] ^ v[2] ^ v[3];
    }
    /* Words are read in the machine's byte order, because fingerprints do not leave it. */
    static inline kb_fingerprint kb_fingerprint_of(
            const kb_fingerprint *secret, const char *text, size_t size) {
        uint64_t v[4] = {
            secret->low ^ 0x736f6d6570736575u, secret->high ^ 0x646f72616e646f6du ^ 0xee,
            secret->low ^ 0x6c7967656e657261u, secret->high ^ 0x7465646279746573u,
        };
        uint64_t word, last = 0;
        size_t left = size;
        kb_fingerprint found;
        for (; left >= 8; left -= 8, text += 8) {
            memcpy(&word, text, 8);
            kb_add_word(v, word);
        }
        while (left > 0) {
            left -= 1;
            last = last << 8 | (unsigned char) text[left];
        }
        kb_add_word(v, (uint64_t) size << 56 | last);
        v[2] ^= 0xee;
        found.low = kb_finished(v);
        v[1] ^= 0xdd;
        found.high = kb_finished(v);
        return found;
    }
    /* In a time that depends on neither. */
    static inline int kb_is_same_fingerprint(
            const kb_fingerprint *one, const kb_fingerprint *other) {
        return ((one->low ^ other->low) | (one->high ^ other->high)) == 0;
    }
    """
    ctypedef struct Fingerprint "kb_fingerprint":
        uint64_t low
        uint64_t high

    Fingerprint fingerprint_of "kb_fingerprint_of"(
        const Fingerprint *secret, const char *text, size_t size
    ) nogil
    bint is_same_fingerprint "kb_is_same_fingerprint"(
        const Fingerprint *one, const Fingerprint *other
    ) nogil
